"""A model as the planner sees it: its blocks in order, each with a graph, and where they read their parameters."""

from __future__ import annotations

import hashlib
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from blockkit.errors import BadInput
from blockkit.graph.graph import Graph, Node
from blockkit.graph.ops import Mix

from ..calling.interface import Interface, device_of, vocabulary
from ..calling.numbers import foreign, require_numbers
from ..calling.token_rows import TOKENS_FIRST
from .exported import Twin, export
from .finding import Call, Found, Key, evaluating, find_blocks
from .first_position import first_position
from .single_precision import float32_by_default
from .translate import translate
from .values import STREAM, Stored, Tap, Translation, rows_in_place

PRIMES = (11, 13, 17, 19, 23, 29, 31, 37)  # numbers of tokens, one of which is no size of the model's
FEWER = (7, 5), (5, 3)  # for models that have no places for as many
INPUT = "input"  # of a graph whose stream depends on the context


@dataclass(frozen=True)
class Block:
    """One call of a block.

    Attributes:
        path: the module's, in the model.
        number: how many calls of the same module came before in one forward.
        graph: its parameters are named by their path within the block.
        taps: where it reads parameters, in order.
        stored: how the parameters lie in their tensors.
        stream, result: where the residual stream is among the arguments, and in what is given back.
        axis: of the tokens, in the stream.
    """

    path: str
    number: int
    graph: Graph
    taps: tuple[Tap, ...]
    stored: Mapping[str, Stored]
    stream: Key
    result: tuple[Key, ...]
    axis: int

    def full(self, parameter: str) -> str:
        """The parameter's name in the model's state dict."""
        return f"{self.path}.{parameter}" if self.path else parameter

    def value(self, parameter: str, tensor: Callable[[str], Tensor]) -> Tensor:
        """A parameter as the graph reads it, `[d_out, d_in]` or `[width]`, of the tensors in the state dict's names."""
        stored = self.stored[parameter]
        if stored.derived is not None:
            return stored.derived.value(lambda name: tensor(self.full(name)))
        return rows_in_place(tensor(self.full(parameter)), stored)


@dataclass(frozen=True)
class Traced:
    """The blocks of a model, in the order in which it runs them.

    Attributes:
        after: the module behind the last block (the final norm), which can make up for blocks that have no route.
        first: the position of a sequence's first token.
    """

    blocks: tuple[Block, ...]
    after: Block | None = None
    first: int = 0

    @property
    def kinds(self) -> dict[str, Graph]:
        """The distinct graphs, by the path of the first block that has each."""
        found: dict[str, Graph] = {}
        for block in self.blocks:
            if all(graph != block.graph for graph in found.values()):
                found[block.path or "model"] = block.graph
        return found


_ONE = threading.RLock()  # `torch.export` traces one module at a time
_traced: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Traced]] = weakref.WeakKeyDictionary()


def trace(model: nn.Module, example: Any = None) -> Traced:
    """Finds and translates the model's blocks; what was found is kept as long as the model and its shapes are.

    Args:
        example: what the model is called with, where it is not token ids or a stream `[1, tokens, d_model]` alone: a
            tensor, a mapping of all keyword arguments, or one of those that it needs beside ids or stream.

    Raises:
        BadInput: no blocks are found, or one cannot be traced.
    """
    Interface.of(model)  # refuses what cannot be watched
    require_numbers(model)
    if example is not None and not isinstance(example, Tensor | Mapping):
        raise BadInput(f"example must be a tensor or a mapping of keyword arguments, got {type(example).__name__}")
    key = _state(model), _shape(example)
    known = _traced.get(model)
    if known is not None and known[0] == key:
        return known[1]
    device = device_of(model)
    with _ONE, evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        found = _found(model, example)
    _traced[model] = key, found
    return found


def _state(model: nn.Module) -> Any:
    """What must stay for a trace to hold: classes with their settings and hooks, the parameters and their shapes."""
    shapes = tuple((n, tuple(p.shape), id(p)) for n, p in model.named_parameters(remove_duplicate=False))
    return tuple((type(m), _settings(m)) for m in model.modules()), shapes


_OWN = frozenset(vars(nn.Module()))  # what every module has


def _settings(module: nn.Module) -> Any:
    """A module's numbers, words and functions, and what is called before and after it."""
    own = tuple((k, s) for k, v in vars(module).items() if k not in _OWN and (s := _summary(v)) is not None)
    return own, *(tuple(map(id, h.values())) for h in (module._forward_hooks, module._forward_pre_hooks))


def _summary(value: Any) -> Any:
    """A setting as it can be kept without keeping what it belongs to; None for what is none."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if type(value) in (dict, list, tuple):
        parts = value.items() if type(value) is dict else value
        return tuple(_summary(part) for part in parts)
    return id(value) if inspect.isroutine(value) else None


def _shape(example: Any) -> Any:
    if isinstance(example, Tensor):
        return tuple(example.shape), str(example.dtype)
    if isinstance(example, Mapping):
        return tuple((k, _shape(v)) for k, v in sorted(example.items()))
    return None if example is None else type(example).__name__


def _found(model: nn.Module, example: Any) -> Traced:
    calls = _calls(model, example)
    shared = _shared(model, calls.blocks)
    kinds: dict[Any, list[tuple[Twin, Translation]]] = {}

    def translation(call: Call, place: int) -> Translation:
        """That of a block before it which does the same, or a new one."""
        alike = kinds.setdefault(_kind(call, place), [])
        for twin, known in alike:
            if twin.serves(call):
                return known
        with float32_by_default():
            exported = export(call, calls.tokens)
            alike.append((exported.twin, translate(exported)))
        return alike[-1][1]

    def block(call: Call, place: int) -> Block:
        known = translation(call, place)
        strange = {n for n, p in call.module.named_parameters(remove_duplicate=False) if foreign(p) is not None}
        parameters = tuple(
            replace(
                p,
                tied=p.tied or (f"{call.path}.{p.name}" if call.path else p.name) in shared,
                frozen=p.frozen or p.name in strange,
            )
            for p in known.graph.parameters
        )
        graph = known.graph if parameters == known.graph.parameters else replace(known.graph, parameters=parameters)
        taps = tuple(tap for tap in known.taps if not tap.parameters & strange)
        axis = call.axis or (TOKENS_FIRST if call.value.dim() > 2 else 0)
        return Block(call.path, call.number, graph, taps, known.stored, call.stream, call.result, axis)

    blocks = tuple(block(call, place) for place, call in enumerate(calls.blocks))
    after = block(calls.after[-1], len(blocks)) if calls.after else None
    interface, count = Interface.of(model), vocabulary(model)
    ids = None if count is None or "decoder_input_ids" in interface.takes else _ids(model, count, 3)
    first = 0 if ids is None else first_position(model, interface, ids, _beside(interface, example) or {})
    return Traced(blocks, after, first)


def _calls(model: nn.Module, example: Any) -> Found:
    """The calls of the blocks in a short run."""
    interface = Interface.of(model)
    sizes = {s for p in model.parameters() for s in p.shape} | _numbers_in(getattr(model, "config", None))
    primes = [p for p in PRIMES if p not in sizes] or list(PRIMES)
    more = _beside(interface, example)
    if more is None:
        return _of_example(model, interface, example)
    count = vocabulary(model)
    problems = []
    for numbers in (primes, *FEWER) if count is not None else ():
        try:
            return _run(model, interface, _ids(model, count or 0, numbers[0]), list(numbers), more)
        except BadInput:
            raise
        except Exception as error:
            problems.append(f"with token ids: {type(error).__name__}: {error}")
    for width in _widths(model):
        stream = torch.randn(1, primes[0], width, device=device_of(model), dtype=_dtype(model))
        try:
            return _run(model, interface, stream, primes, more)
        except BadInput as error:  # it ran: no other width will do
            raise error from None
        except Exception as error:
            problems.append(f"with a stream of width {width}: {type(error).__name__}: {error}")
    tried = "; ".join(str(p)[:200] for p in list(dict.fromkeys(problems))[:3]) or "it has no parameters"
    raise BadInput(
        f"{type(model).__name__} could not be run to find its blocks ({tried}); give example=, what it is called with"
    )


def _beside(interface: Interface, example: Any) -> Mapping[str, Any] | None:
    """The arguments that an example gives beside ids or stream; None if it gives these, too."""
    if example is None:
        return {}
    whole = isinstance(example, Tensor) or not {"input_ids", "inputs_embeds", interface.first}.isdisjoint(example)
    return None if whole else example


def _run(model: nn.Module, interface: Interface, value: Tensor, primes: list[int], more: Mapping[str, Any]) -> Found:
    options: dict[str, Any] = {"use_cache": False}
    if "decoder_input_ids" in interface.takes and not value.is_floating_point():
        options["decoder_input_ids"] = value[:, :1].expand(1, value.shape[1])
        value = torch.cat([value, value[:, : primes[1] - primes[0]]], dim=1)  # the encoder reads another number
    args, kwargs = interface.inputs(value, **options)
    kwargs |= more
    return find_blocks(model, lambda: model(*args, **kwargs), primes[0], _first_moved(model, args, kwargs))


def _of_example(model: nn.Module, interface: Interface, example: Any) -> Found:
    if isinstance(example, Tensor):
        if example.dim() < 2:
            raise BadInput(f"the example has the shape {tuple(example.shape)}; [batch, tokens, ...] is wanted")
        args, kwargs = interface.inputs(example, use_cache=False)
        tokens = int(example.shape[1])
    else:
        kwargs = dict(example)
        alone = not interface.by_name and interface.first not in ("input_ids", "inputs_embeds")
        args = (kwargs[interface.first],) if alone and interface.first in kwargs else ()
        first = kwargs.get("decoder_input_ids", next((v for v in kwargs.values() if isinstance(v, Tensor)), None))
        if not isinstance(first, Tensor) or first.dim() < 2:
            raise BadInput("the example must hold a tensor [batch, tokens, ...]")
        tokens = int(first.shape[1])
        if args:
            del kwargs[interface.first]
        if "use_cache" in interface.takes:
            kwargs.setdefault("use_cache", False)
    return find_blocks(model, lambda: model(*args, **kwargs), tokens, _first_moved(model, args, kwargs))


def _first_moved(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
    """The same call with another first token."""
    name, value = next((k, v) for k, v in [*enumerate(args), *kwargs.items()] if isinstance(v, Tensor) and v.dim() > 1)
    name = "decoder_input_ids" if "decoder_input_ids" in kwargs else name
    value = kwargs.get("decoder_input_ids", value)
    moved = value.clone()
    moved[:, 0] = value[:, -1] if not value.is_floating_point() else value[:, -1] + 1
    if isinstance(name, int):
        return lambda: model(*args[:name], moved, *args[name + 1 :], **kwargs)
    return lambda: model(*args, **{**kwargs, str(name): moved})


def _ids(model: nn.Module, count: int, tokens: int) -> Tensor:
    """Ordinary ids: none that the configuration names for a special purpose."""
    special = _numbers_in(getattr(model, "config", None))
    ordinary = [i for i in range(count // 4, count) if i not in special] or list(range(count))
    chosen = [ordinary[(7 * i + 3) % len(ordinary)] for i in range(tokens)]
    return torch.tensor([chosen], device=device_of(model))


def _numbers_in(config: Any) -> set[int]:
    """All whole numbers in a configuration, whatever refers to whatever in it."""
    found: set[int] = set()
    stack, seen = [config], {id(config)}
    while stack:
        held = stack.pop()
        if isinstance(held, int) and not isinstance(held, bool | Enum):
            found.add(held)
        elif isinstance(held, Mapping | list | tuple | set):
            parts = held.values() if isinstance(held, Mapping) else held
            stack.extend(new for new in parts if id(new) not in seen)
        elif not isinstance(held, type | Enum | nn.Module) and not inspect.isroutine(held):
            stack.extend(new for new in getattr(held, "__dict__", {}).values() if id(new) not in seen)
        seen.update(map(id, stack))
    return found


def _widths(model: nn.Module) -> list[int]:
    """Sizes that may be the stream's, the most frequent ones first."""
    counts: dict[int, int] = {}
    for p in model.parameters():
        for size in p.shape:
            counts[size] = counts.get(size, 0) + 1
    return sorted((s for s in counts if s > 1), key=lambda s: -counts[s])


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _shared(model: nn.Module, calls: tuple[Call, ...]) -> set[str]:
    """Parameters that more than one place uses: several blocks, a block called again, or the rest of the model."""
    places: dict[int, set[str]] = {}
    names: dict[int, list[str]] = {}
    twice = {c.path for c in calls if c.number > 0}
    paths = {c.path for c in calls}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = max((p for p in paths if name.startswith(f"{p}.") or not p), key=len, default="")
        where = owner if owner in paths else "the rest"
        storage = parameter.data_ptr() or id(parameter)
        places.setdefault(storage, set()).add(where)
        names.setdefault(storage, []).append(name)
        if where in twice:
            places[storage].add(f"{where} again")
    return {name for storage, where in places.items() if len(where) > 1 for name in names[storage]}


def _kind(call: Call, place: int) -> Any:
    """What makes two blocks the same: classes, shapes and settings, without the block's own number."""
    settings = []
    for path, module in call.module.named_modules():
        own = {
            name: _setting(value) for name, value in vars(module).items()
            if name != "training" and not (type(value) is int and value in (place, call.number))
        }  # fmt: skip
        numbers = tuple((n, None if b is None or b.numel() > 1 else _setting(b)) for n, b in module._buffers.items())
        settings.append((path, type(module), tuple(sorted(own.items())), numbers))
    shapes = tuple((n, tuple(p.shape)) for n, p in call.module.named_parameters(remove_duplicate=False))
    given = tuple((k, _described(v)) for k, v in [*enumerate(call.args), *call.kwargs.items()])
    return tuple(settings), shapes, given


def _setting(value: Any) -> Any:
    """A module's attribute, as far as what it computes may depend on it: numbers, words, functions."""
    if isinstance(value, Tensor):  # what is no parameter or buffer becomes part of the program
        numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(numbers).hexdigest()
    if isinstance(value, tuple | list):
        return tuple(_setting(v) for v in value)
    if isinstance(value, bool | str | int | torch.dtype) or inspect.isroutine(value) or value is None:
        return value
    return repr(value) if isinstance(value, float) else type(value).__name__


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, tuple | list):
        return tuple(_described(v) for v in value)
    return value if isinstance(value, bool | str | float | type(None)) else type(value).__name__


def in_context(graph: Graph) -> Graph:
    """The same block where the residual stream itself depends on the context: it comes out of a mixing node."""
    first = Node(STREAM, Mix(graph.width), (INPUT,))
    return Graph.build(INPUT, graph.output, graph.width, graph.parameters, (first, *graph.nodes))
