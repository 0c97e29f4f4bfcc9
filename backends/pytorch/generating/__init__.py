"""Token by token: a patch for each token or one that grows, and the generation experiment.

Imports every other room of this backend.
"""
