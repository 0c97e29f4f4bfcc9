"""Blocks as people look at them: drawn as SVG or Mermaid, derived in LaTeX."""
