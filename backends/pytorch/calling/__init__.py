"""How a model in memory is loaded and called: its interface, the prompts, what a caller may give beside them.

Imports no other room of this backend.
"""
