"""How a model is called: which of the usual keyword arguments its `forward` takes, and where its logits are."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockkit.errors import BadInput


@dataclass(frozen=True)
class Interface:
    """What `forward` takes.

    Attributes:
        takes: the names of its parameters.
        anything: whether it takes keyword arguments that it does not name.
        first: the name of the first one.
        by_name: whether that one has to be given by name.
    """

    takes: frozenset[str]
    anything: bool
    first: str
    by_name: bool = False

    @staticmethod
    def of(model: nn.Module) -> Interface:
        """What the model takes.

        Raises:
            BadInput: it takes nothing, or cannot be watched while it runs (compiled, or sharded over processes).
        """
        if not isinstance(model, nn.Module):
            raise BadInput(f"the model is a {type(model).__name__}; a torch.nn.Module is wanted")
        _require_watchable(model)
        called = model.module if isinstance(model, nn.DataParallel) else model
        if type(called).forward is nn.Module.forward:
            raise BadInput(
                f"{type(called).__name__} has no forward of its own; give the module that runs what it holds"
            )
        found = list(inspect.signature(called.forward).parameters.values())
        named = [p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY, p.KEYWORD_ONLY)]
        anything = any(p.kind is p.VAR_KEYWORD for p in found)
        if not named and not any(p.kind is p.VAR_POSITIONAL for p in found):
            raise BadInput(f"{type(model).__name__}.forward takes no input")
        by_name = bool(named) and found[0].kind is inspect.Parameter.KEYWORD_ONLY
        return Interface(frozenset(named), anything, named[0] if named else "", by_name)

    def inputs(self, value: Tensor, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call: ids `[batch, n]` or embeddings `[batch, n, d_model]`, and those options it takes."""
        passed_on = self.takes | ({"use_cache"} if self.anything else set())
        kept = {k: v for k, v in options.items() if v is not None and k in passed_on}
        if not value.is_floating_point() and "input_ids" in self.takes:
            return (), {"input_ids": value, **kept}
        if value.is_floating_point() and "inputs_embeds" in self.takes:
            return (), {"inputs_embeds": value, **kept}
        return ((), {self.first: value, **kept}) if self.by_name else ((value,), kept)


QUANTISED = ("torch.ao.nn.quantized", "torch.nn.quantized")
SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DistributedDataParallel")


def _require_watchable(model: nn.Module) -> None:
    """Refuses models whose Python code does not run, or whose parameters are elsewhere."""
    for path, module in model.named_modules():
        where = path or type(model).__name__
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise BadInput(
                f"{where} is compiled (torch.compile), so what it reads cannot be watched; give the module that was "
                "compiled (its _orig_mod, or a copy on which .compile() was not called)"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise BadInput(
                f"{where} is scripted (torch.jit), so what it reads cannot be watched; give the module itself"
            )
        if any(c.__module__.startswith(QUANTISED) for c in type(module).__mro__):
            raise BadInput(
                f"{where} is a quantised {type(module).__name__}; give the model with floating-point weights"
            )
        wrapper = next((c.__name__ for c in type(module).__mro__ if c.__name__ in SHARDED), None)
        if wrapper is not None:
            raise BadInput(f"{where} is a {wrapper}, spread over processes; give the plain module (.module)")


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
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    sizes = {table.num_embeddings for table in tables}
    if len(sizes) < 2:
        return next(iter(sizes), None)
    known = _vocabularies.get(model)
    if known is None:
        known = _vocabularies[model] = _read_by_ids(model, tables) or max(sizes)
    return known


_vocabularies: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
PATTERN = (0, 0, 1, 0, 1, 1, 0)  # ids that no count of places looks like


def _read_by_ids(model: nn.Module, tables: list[nn.Embedding]) -> int | None:
    """Of several tables, the size of the one that a run on some ids looks these up in."""
    ids = torch.tensor([PATTERN], device=device_of(model))
    found: list[int] = []

    def hook(table: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(table, nn.Embedding) and args and tuple(args[0].flatten().tolist()) == PATTERN:
            found.append(table.num_embeddings)

    with ExitStack() as hooks, torch.no_grad(), suppress(Exception):  # a model that needs more shows its tables too
        for table in tables:
            hooks.enter_context(table.register_forward_pre_hook(hook))
        args, kwargs = Interface.of(model).inputs(ids)
        model(*args, **kwargs)
    return found[0] if found else None


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are (of several devices, the first)."""
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return torch.device("cpu")
