"""How a model is called: which of the usual keyword arguments its `forward` takes, and where its logits are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockkit.errors import BadInput

IDS = ("input_ids", "idx", "tokens", "ids")  # what an embedding reads, by the names in use


@dataclass(frozen=True)
class Interface:
    """What `forward` takes.

    Attributes:
        takes: the names of its parameters.
        anything: whether it takes keyword arguments that it does not name.
        first: the name of the first one.
    """

    takes: frozenset[str]
    anything: bool
    first: str

    @staticmethod
    def of(model: nn.Module) -> Interface:
        found = inspect.signature(model.forward).parameters.values()
        named = [p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY, p.KEYWORD_ONLY)]
        anything = any(p.kind is p.VAR_KEYWORD for p in found)
        if not named and not any(p.kind is p.VAR_POSITIONAL for p in found):
            raise BadInput(f"{type(model).__name__}.forward takes no input")
        return Interface(frozenset(named), anything, named[0] if named else "")

    def inputs(self, value: Tensor, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call: ids `[batch, n]` or embeddings `[batch, n, d_model]`, and those options it takes."""
        passed_on = self.takes | ({"use_cache"} if self.anything else set())
        kept = {k: v for k, v in options.items() if v is not None and k in passed_on}
        if not value.is_floating_point() and "input_ids" in self.takes:
            return (), {"input_ids": value, **kept}
        if value.is_floating_point() and "inputs_embeds" in self.takes:
            return (), {"inputs_embeds": value, **kept}
        return (value,), kept


def logits_of(result: Any) -> Tensor:
    """What the model gives: its logits `[batch, n, vocabulary]`, or the stream of a bare block.

    Raises:
        BadInput: there is no floating-point tensor in the result.
    """
    found = getattr(result, "logits", None)
    if isinstance(found, Tensor):
        return found
    for value in leaves(result):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise BadInput(f"the model gave {type(result).__name__}, in which there are no logits")


def leaves(value: Any) -> list[Any]:
    """All that stands in nested tuples, lists and mappings, in order."""
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in leaves(part)]
    if isinstance(value, tuple | list):
        return [leaf for part in value for leaf in leaves(part)]
    return [value]


def vocabulary(model: nn.Module) -> int | None:
    """How many ids the model knows; None for one that reads no ids."""
    embedding = None
    if hasattr(model, "get_input_embeddings"):
        try:
            embedding = model.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            embedding = None
    if isinstance(getattr(embedding, "weight", None), Tensor) and embedding is not None:
        return int(embedding.weight.shape[0])
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(tables, default=None)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are (of several devices, the first)."""
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return torch.device("cpu")
