"""Algorithm 1 (arXiv 2511.17864) over an abstract executor: absorb a context block by block, and prove the patch.

Also the reference executor (NumPy), error measures, and how a backend is found. Imports `blockkit.solve`,
`blockkit.checkpoint` and what lies below them.
"""
