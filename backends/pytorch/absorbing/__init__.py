"""Algorithm 1 inside the model's own forward, and its proof by an ordinary run of the edited model.

Imports the rooms above but `generating`.
"""
