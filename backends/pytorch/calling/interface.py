"""How a model is called: which of the usual keyword arguments its `forward` takes, and where its logits are."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from blockkit.errors import BadInput

from .exclusive import of_this_thread

INPUTS = frozenset(["input_ids", "inputs_embeds", "decoder_input_ids"])
HANDED_ON = frozenset(["position_ids", "logits_to_keep", "use_cache"])  # what a wrapper may take without naming it


@dataclass(frozen=True)
class Interface:
    """What `forward` takes.

    A wrapper's `forward(*args, **kwargs)` names nothing. What it takes is what the module that it leads to takes; that
    positions get there, numbers have to show.

    Attributes:
        takes: the names of its parameters.
        anything: whether it takes keyword arguments that it does not name.
        first: the name of the first one.
        by_name: whether that one has to be given by name.
        loses: why positions do not reach the module that takes them; empty where they do, or none takes any.
    """

    takes: frozenset[str]
    anything: bool
    first: str
    by_name: bool = False
    loses: str = ""

    @staticmethod
    def of(model: nn.Module) -> Interface:
        """What the model takes.

        Raises:
            BadInput: it takes nothing, or cannot be watched while it runs (compiled, or sharded over processes).
        """
        found = Interface.named(model)
        inner = led_to(model)
        if inner is model or not found.anything or "position_ids" in found.takes:
            return found
        its = _parameters(inner)
        names = frozenset(p.name for p in its if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL)
        if found.takes & INPUTS:
            added, first = names & HANDED_ON, found.first
        else:
            added, first = names, its[0].name
        whole = replace(found, takes=found.takes | added, first=first)
        if "position_ids" not in added or heeds_positions(model, whole):
            return whole
        why = f"{type(model).__name__}.forward does not hand position_ids on to its {type(inner).__name__}"
        return replace(whole, takes=whole.takes - {"position_ids"}, loses=why)

    @staticmethod
    def named(model: nn.Module) -> Interface:
        """What the model's own `forward` names; `Raises` as `of`."""
        if not isinstance(model, nn.Module):
            raise BadInput(f"the model is a {type(model).__name__}; a torch.nn.Module is wanted")
        _require_watchable(model)
        if type(_called(model)).forward is nn.Module.forward:
            raise BadInput(
                f"{type(_called(model)).__name__} has no forward of its own; give the module that runs what it holds"
            )
        found = _parameters(model)
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


def _called(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.DataParallel) else model


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(_called(model).forward).parameters.values())


def led_to(model: nn.Module) -> nn.Module:
    """The module that reads what a wrapper is called with: the outermost one within it that names its inputs.

    The model itself where it names all of them, or where nothing within it does.
    """

    def takes(module: nn.Module, names: frozenset[str]) -> bool:
        own = type(module).forward is not nn.Module.forward
        return own and not names.isdisjoint(p.name for p in _parameters(module))

    outer, *rest = _called(model).modules()
    if not any(p.kind is p.VAR_KEYWORD for p in _parameters(outer)):
        return model
    wanted = frozenset(["position_ids"]) if takes(outer, INPUTS) else INPUTS | {"position_ids"}
    return model if takes(outer, wanted) else next((m for m in rest if takes(m, wanted)), model)


PATTERN = (0, 0, 1, 0, 1, 1, 0)  # ids that no count of places looks like, and that every vocabulary has


def heeds_positions(model: nn.Module, interface: Interface) -> bool:
    """Whether the model gives other logits for other positions, on a few ids.

    False for a model that cannot be run on ids alone, or gives other logits at every run.
    """
    ids = torch.tensor([PATTERN], device=device_of(model))
    places = torch.arange(len(PATTERN), device=ids.device)[None]

    def logits(positions: Tensor) -> Tensor:
        args, kwargs = interface.inputs(ids, position_ids=positions, use_cache=False)
        return logits_of(model(*args, **kwargs))

    with torch.no_grad():
        try:
            plain, apart = logits(places), logits(2 * places)
            return torch.equal(plain, logits(places)) and not torch.equal(plain, apart)
        except Exception:  # what it is called with later will tell why
            return False


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


def _read_by_ids(model: nn.Module, tables: list[nn.Embedding]) -> int | None:
    """Of several tables, the size of the one that a run on some ids looks these up in."""
    ids = torch.tensor([PATTERN], device=device_of(model))
    found: list[int] = []

    def hook(table: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(table, nn.Embedding) and args and tuple(args[0].flatten().tolist()) == PATTERN:
            found.append(table.num_embeddings)

    with ExitStack() as hooks, torch.no_grad(), suppress(Exception):  # a model that needs more shows its tables too
        for table in tables:
            hooks.enter_context(table.register_forward_pre_hook(of_this_thread(hook)))
        args, kwargs = Interface.named(model).inputs(ids)
        model(*args, **kwargs)
    return found[0] if found else None


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are (of several devices, the first)."""
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return torch.device("cpu")
