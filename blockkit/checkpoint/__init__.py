"""Models on disk: Hugging Face folders, GGUF files and tokenizers, read as architectures and parameter slots.

Imports `blockkit.graph` and `blockkit.design`.
"""
