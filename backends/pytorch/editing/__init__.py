"""Putting a patch on a model in memory and taking it off to the last bit, with a receipt.

Imports `calling`, `blocks` and `watching`.
"""
