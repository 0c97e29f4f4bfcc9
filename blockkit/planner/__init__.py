"""Which parameters can stand in for the context, and why, or why not.

No numbers: routes are derived from the laws of a graph's operations. Start at `rule.py`, which is the theorem.
Imports `blockkit.graph` and `blockkit.design`.
"""
