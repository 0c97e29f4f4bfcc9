"""Watching a model's own run: tensors that stand in parameters' places, and what each block reads and gives.

Imports `calling` and `blocks`.
"""
