"""What was found: a patch, its file, what a backend for models in memory does with it, and what it is exported to.

Imports `blockkit.absorbing` and what lies below it.
"""
