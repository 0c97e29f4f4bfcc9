"""What the core asks of PyTorch about a model in memory; see `blockkit.patch.in_place.InPlace`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockkit.absorbing.generation import Settings
from blockkit.errors import BadInput
from blockkit.graph.graph import Graph
from blockkit.patch.in_place import Receipt
from blockkit.patch.patch import Patch

from .absorbing.absorb import absorb
from .absorbing.run import model_dtype
from .blocks.traced import trace
from .calling.interface import device_of
from .editing import editor as editing
from .editing.patch import TorchPatch
from .generating.experiment import TransformersExperiment

OPTIONS = tuple(p.name for p in signature(absorb).parameters.values() if p.kind is Parameter.KEYWORD_ONLY)


class TorchInPlace:
    """Models in memory that are `torch.nn.Module`."""

    def graphs(self, model: Any, example: Any = None) -> Mapping[str, Graph]:
        """The distinct blocks' graphs, by path; see `blockkit.patch.in_place.InPlace.graphs`."""
        return trace(model, example).kinds

    def absorb(self, model: Any, context: Any, query: Any, **options: Any) -> TorchPatch:
        """See `blockkit.patch.in_place.InPlace.absorb`; options as for `blockkit.backends.pytorch.absorb`.

        Raises:
            BadInput: an option that there is not, or what `absorb` refuses.
        """
        if unknown := [name for name in options if name not in OPTIONS]:
            raise BadInput(f"absorb takes no {unknown[0]!r} for a PyTorch model; allowed are {', '.join(OPTIONS)}")
        return absorb(model, _tensor(model, "context", context), _tensor(model, "query", query), **options)

    def experiment(self, model: Any, ids: list[int], settings: Settings) -> TransformersExperiment:
        """See `blockkit.patch.in_place.InPlace.experiment`."""
        return TransformersExperiment(model, ids, replace(settings, dtype=model_dtype(model)))

    def check(self, patch: Patch, model: Any) -> None:
        """See `blockkit.patch.in_place.InPlace.check`."""
        editing.check(patch, model)

    def apply(self, patch: Patch, model: Any, merge: bool, allow_other_weights: bool = False) -> Receipt:
        """See `blockkit.patch.in_place.InPlace.apply`."""
        return editing.apply(patch, model, merge, allow_other_weights)

    def remove(self, patch: Patch, model: Any) -> None:
        """See `blockkit.patch.in_place.InPlace.remove`."""
        editing.remove(patch, model)


def _tensor(model: Any, name: str, value: Any) -> Tensor:
    """Ids as a tensor where the model is; a tensor stays what it is."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(np.asarray(value), device=device_of(model))
    except (TypeError, ValueError, RuntimeError):
        raise BadInput(
            f"the {name} must be token ids [batch, n] (a tensor, an array or nested lists), got {value!r:.60}"
        ) from None


in_place = TorchInPlace()
