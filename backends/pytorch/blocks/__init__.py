"""Finding a model's blocks by an ordinary run, exporting each, and translating it to a graph held against numbers.

Imports `calling`.
"""
