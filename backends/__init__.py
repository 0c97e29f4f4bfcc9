"""Backends: each carries plans out on real tensors. They import nothing from each other."""
