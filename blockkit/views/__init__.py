"""What people and programs see: pages of text, JSON objects, drawings, formulas and plots. Nothing is computed here.

Imports any room but the command line.
"""
