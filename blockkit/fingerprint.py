"""One digest over many tensors: SHA-256 of each one's bytes, shape and dtype, and SHA-256 of those.

A tensor's digest is a leaf, found once and kept for as long as the tensor is known to be the same; the root over all
leaves is worked out anew whenever it is asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def leaf(dtype: str, shape: Sequence[int], parts: Iterable[Any]) -> str:
    """The digest of one tensor, whose bytes come as buffers one after another."""
    found = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
    for part in parts:
        found.update(part)
    return found.hexdigest()


def root(leaves: Mapping[str, str]) -> str:
    """The digest over all leaves, by name, in the order of their names."""
    found = hashlib.sha256()
    for name, digest in sorted(leaves.items()):
        found.update(f"{len(name)} {name} {digest}\n".encode())
    return found.hexdigest()


def all_leaves(work: Mapping[str, Callable[[], str]]) -> dict[str, str]:
    """Leaves that are still to be found, several at a time: hashing lets other threads run."""
    if not work:
        return {}
    with ThreadPoolExecutor(min(len(work), os.cpu_count() or 1, 8)) as pool:
        return dict(zip(work, pool.map(lambda find: find(), work.values()), strict=True))
