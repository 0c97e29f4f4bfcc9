"""What a caller gives beside model, context and query: taken as what it has to be, or refused by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from blockkit.errors import BadInput

Retained: TypeAlias = Tensor | Iterable[int] | slice  # type: ignore[explicit-any, valid-type, unused-ignore]
OWN = ("input_ids", "inputs_embeds", "position_ids", "attention_mask", "past_key_values", "cache", "use_cache")


def require_whole(name: str, value: Any, least: int) -> None:
    """Refuses what is no whole number, or too small."""
    if type(value) is not int or value < least:
        raise BadInput(f"{name} must be a whole number of at least {least}, got {value!r:.60}")


def keywords(name: str, value: Any) -> dict[str, Any]:
    """Further keyword arguments of the model's forward; none of those that are worked out from context and query."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise BadInput(f"{name} must be a mapping of keyword arguments of the model's forward, got {value!r:.60}")
    if given := [key for key in value if key in OWN]:
        raise BadInput(
            f"{name} holds {given[0]}, which follows from context and query; padding is told by context_mask and "
            "query_mask, embeddings may stand for ids"
        )
    return dict(value)


def decoder_ids(value: Any, batch: int) -> dict[str, Tensor]:
    """What a decoder reads, ids `[batch, t]`, as a keyword argument; nothing where there is none."""
    if value is None:
        return {}
    if not isinstance(value, Tensor) or value.dim() != 2 or value.is_floating_point() or not value.shape[1]:
        raise BadInput(f"decoder_input_ids must be a tensor of ids [batch, t], got {_described(value)}")
    if value.shape[0] != batch:
        raise BadInput(f"decoder_input_ids has {value.shape[0]} sequences and the query {batch}; give as many")
    return {"decoder_input_ids": value}


def places(retain: Any, n: int) -> Tensor:
    """The places of the retained context tokens, in order; int64 on the host."""
    if retain is None:
        return torch.arange(0)
    try:
        found = _numbers(retain, n)
    except (TypeError, ValueError, RuntimeError):
        raise BadInput(
            f"retain must be places in the context (a slice, a list of numbers from 0 to {n - 1}, or a mask of "
            f"{n} entries), got {_described(retain)}"
        ) from None
    if found.dtype == torch.bool:
        if tuple(found.shape) != (n,):
            raise BadInput(f"retain as a mask must have one entry for each of the {n} context tokens")
        found = found.nonzero().flatten()
    if found.dim() != 1 or (found.is_floating_point() and found.numel()):
        raise BadInput(f"retain must be a row of whole numbers, got {_described(retain)}")
    found = found.long()
    if found.numel() and not (int(found.min()) >= 0 and int(found.max()) < n and bool((found.diff() > 0).all())):
        raise BadInput(f"retain must be places in the context, from 0 to {n - 1}, in order and each once")
    if found.numel() == n:
        raise BadInput("the whole context is retained: there is nothing to absorb")
    return found


def _numbers(retain: Any, n: int) -> Tensor:
    if isinstance(retain, slice):
        retain = range(n)[retain]
    return (retain if isinstance(retain, Tensor) else torch.as_tensor(list(retain))).cpu()


def stops(value: Any) -> frozenset[int]:
    """Ids after which nothing follows; one alone may stand without a set."""
    found = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(type(i) is int for i in found):
        raise BadInput(f"stop_at must be ids, as {{1, 2}}, got {value!r:.60}")
    return frozenset(found)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')} on {value.device}"
    return f"{type(value).__name__} {value!r:.60}"
