"""The numbers of a plan's steps: a residual at the goal, pulled back along the laws to a parameter.

Imports `blockkit.graph` and `blockkit.planner`.
"""
