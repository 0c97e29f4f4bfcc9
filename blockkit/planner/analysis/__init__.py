"""What is known of a graph before any route is looked for, and what a route asks of the values on it.

Imports `blockkit.graph`.
"""
