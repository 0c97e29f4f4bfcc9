"""What people write: components, blocks, architectures and documents, lowered to graphs.

Also the catalogue, the only place where any architecture is known by name. Imports `blockkit.graph`.
"""
