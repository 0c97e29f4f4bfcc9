"""What the core asks of PyTorch about a model in memory; see `blockkit.patch.in_place.InPlace`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockkit.graph.graph import Graph
from blockkit.patch.in_place import Receipt
from blockkit.patch.patch import Patch

from ..blocks.traced import trace
from . import editor as editing


class TorchInPlace:
    """Models in memory that are `torch.nn.Module`."""

    def graphs(self, model: Any, example: Any = None) -> Mapping[str, Graph]:
        """The distinct blocks' graphs, by path; see `blockkit.patch.in_place.InPlace.graphs`."""
        return trace(model, example).kinds

    def check(self, patch: Patch, model: Any) -> None:
        """See `blockkit.patch.in_place.InPlace.check`."""
        editing.check(patch, model)

    def apply(self, patch: Patch, model: Any, merge: bool, allow_other_weights: bool = False) -> Receipt:
        """See `blockkit.patch.in_place.InPlace.apply`."""
        return editing.apply(patch, model, merge, allow_other_weights)

    def remove(self, patch: Patch, model: Any) -> None:
        """See `blockkit.patch.in_place.InPlace.remove`."""
        editing.remove(patch, model)


in_place = TorchInPlace()
