"""A plan tried on small random numbers, and written down so that anybody can recheck it.

Imports `blockkit.api`, `blockkit.solve` and what lies below them.
"""
