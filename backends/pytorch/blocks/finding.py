"""Where the blocks of a model are: found by an ordinary run, by structure, not by name.

The residual stream runs through modules that give back the shape they got. Those under one parent with numbers for
names (`model.layers.3`), outermost first, of which at least one looks across tokens, are the blocks. A module that
has none is a block itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from blockkit.errors import BadInput

from ..calling.exclusive import of_this_thread
from ..calling.interface import leaves

Key = int | str
NUMBERED = re.compile(r"^(?:(.*)\.)?(\d+)$")


@dataclass(frozen=True)
class Call:
    """One call of a module through which the residual stream runs.

    Attributes:
        path: the module's, in the model; empty for the model itself.
        stream: where the stream is among the arguments: a position or a keyword.
        axis: of the tokens in the stream.
        result: where it is in the result: positions and keys, from the outside in.
        number: how many calls of the same module came before.
        own: which of the leaves of the arguments hold rows of the tokens, each token's its own (embeddings that are
            passed along).
        across: which of them hold what depends on other tokens as well (keys and values of an earlier block).
    """

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream: Key
    axis: int
    result: tuple[Key, ...]
    number: int
    out: Tensor
    own: frozenset[int] = frozenset()
    across: frozenset[int] = frozenset()

    @property
    def value(self) -> Tensor:
        """The stream that was read."""
        return self.args[self.stream] if isinstance(self.stream, int) else self.kwargs[self.stream]

    def called_with(self, stream: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments, with another stream."""
        if isinstance(self.stream, int):
            return (*self.args[: self.stream], stream, *self.args[self.stream + 1 :]), self.kwargs
        return self.args, {**self.kwargs, self.stream: stream}


def at(value: Any, place: tuple[Key, ...]) -> Any:
    """The part of a nested result that stands at `place`."""
    for key in place:
        value = value[key]
    return value


def replaced(value: Any, place: tuple[Key, ...], part: Any) -> Any:
    """The nested result with another part at `place`."""
    if not place:
        return part
    inner = replaced(value[place[0]], place[1:], part)
    if isinstance(value, tuple):
        changed = [inner if i == place[0] else part for i, part in enumerate(value)]
        return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    value[place[0]] = inner
    return value


@dataclass(frozen=True)
class Found:
    """The calls of a model's blocks, in order, and those of modules with parameters that only come after them.

    Attributes:
        tokens: how many rows the stream has (more than the ids, where the model puts some of its own before them).
    """

    blocks: tuple[Call, ...]
    after: tuple[Call, ...]
    tokens: int


def find_blocks(model: nn.Module, run: Callable[[], Any], tokens: int, moved: Callable[[], Any] | None = None) -> Found:
    """The calls of the model's blocks in `run`, a forward of `tokens` tokens.

    Args:
        moved: the same forward with another first token: it shows which further arguments depend on the tokens.

    Raises:
        BadInput: nothing in it keeps the residual stream's shape and looks across tokens.
    """
    longest = _longest(model, run)
    for rows in dict.fromkeys([tokens, *longest]):  # a model may put rows of its own before the tokens'
        calls = _observed(model, run, rows)
        blocks = _blocks_among(calls)
        if blocks:
            others = {} if moved is None else {(c.path, c.number): c for c in _observed(model, moved, rows)}
            return _with_rest(tuple(_told(c, others.get((c.path, c.number))) for c in blocks), calls, rows)
    seen = ", ".join(sorted({c.path for c in _observed(model, run, tokens)})[:8]) or "none"
    raise BadInput(
        f"no blocks were found in {type(model).__name__}: no module gives back a residual stream of the shape it "
        f"got and looks across tokens (modules that keep the shape: {seen})"
    )


def _blocks_among(calls: list[Call]) -> tuple[Call, ...]:
    for family in _families(calls):
        if any(_mixes(call) for call in family):
            return _whole(family, calls)
    whole = [c for c in calls if not c.path]
    if whole and not _mixes(whole[0]) and _crosses_sequences(whole[0]):
        raise BadInput(
            f"{type(whole[0].module).__name__} looks across its first axis, so it reads [tokens, batch, d_model]; a "
            "block on its own has to read [batch, tokens, d_model]: wrap it in a module that transposes it"
        )
    return tuple(whole or [c for c in _outermost(calls) if _mixes(c)])


def _told(call: Call, other: Call | None) -> Call:
    """The call, with which of its arguments depend on the tokens."""
    if other is None:
        return call
    pairs = zip(leaves((call.args, call.kwargs)), leaves((other.args, other.kwargs)), strict=False)
    own: set[int] = set()
    across: set[int] = set()
    for place, (mine, its) in enumerate(pairs):
        if mine is call.value or not isinstance(mine, Tensor) or not isinstance(its, Tensor) or mine.shape != its.shape:
            continue
        tokens = call.value.shape[call.axis]
        axes = [i for i, size in enumerate(mine.shape) if size == tokens]
        if not mine.is_floating_point() or len(axes) != 1 or torch.equal(mine, its):
            continue
        rest = slice(1, tokens)
        same = torch.equal(mine.movedim(axes[0], 0)[rest], its.movedim(axes[0], 0)[rest])
        (own if same else across).add(place)
    return replace(call, own=frozenset(own), across=frozenset(across))


def _longest(model: nn.Module, run: Callable[[], Any]) -> list[int]:
    """Numbers of rows that numbered modules give back, the most frequent first."""
    counts: dict[int, int] = {}

    def hook(module: nn.Module, args: Any, result: Any) -> None:
        for _, out in _tensors(result):
            if out.dim() > 2:
                counts[out.shape[-2]] = counts.get(out.shape[-2], 0) + 1
            return

    with ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():
            if NUMBERED.match(path):
                hooks.enter_context(module.register_forward_hook(of_this_thread(hook)))
        run()
    return sorted(counts, key=lambda size: -counts[size])


def _with_rest(blocks: tuple[Call, ...], calls: list[Call], tokens: int) -> Found:
    """Whatever keeps the stream's shape behind the last block, outermost: the final norm, as a rule."""
    ends = blocks[-1].path, blocks[-1].number
    last = max(i for i, c in enumerate(calls) if (c.path, c.number) == ends)
    inside = {b.path for b in blocks}
    rest = [c for c in calls[last + 1 :] if not any(_inside(c.path, p) for p in inside)]
    return Found(blocks, tuple(c for c in _outermost(rest) if c.value.shape == blocks[-1].out.shape), tokens)


def _observed(model: nn.Module, run: Callable[[], Any], tokens: int) -> list[Call]:
    """Every call that reads and gives floating-point tensors of one shape with a token axis, as they start."""
    found: list[Call | None] = []
    open_: list[int] = []
    counts: dict[str, int] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        open_.append(len(found))
        found.append(None)

    def after(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            place = open_.pop()
            matched = _matched(args, kwargs, result, tokens)
            if matched is not None:
                number = counts[path] = counts.get(path, -1) + 1
                stream, where, out = matched
                axis = out.shape.index(tokens)
                given = tuple(_stateless(a) for a in args), {k: _stateless(v) for k, v in kwargs.items()}
                found[place] = Call(path, module, *given, stream, axis, where, number, out)

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(of_this_thread(before), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(of_this_thread(after(path)), with_kwargs=True))
        run()
    return [c for c in found if c is not None]


def _stateless(value: Any) -> Any:
    """An argument without what the model remembers in it: no cache, and dictionaries as they are now."""
    if hasattr(value, "get_seq_length"):
        return None
    return dict(value) if isinstance(value, Mapping) else value


def _matched(args: Any, kwargs: Any, result: Any, tokens: int) -> tuple[Key, tuple[Key, ...], Tensor] | None:
    """Where a stream goes in and comes out: the first result that has the shape of an argument."""
    for place, out in _tensors(result):
        if tokens not in out.shape or out.dim() < 2:
            continue
        for key, value in [*enumerate(args), *kwargs.items()]:
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == out.shape:
                return key, place, out
        return None
    return None


def _tensors(result: Any, place: tuple[Key, ...] = ()) -> Iterator[tuple[tuple[Key, ...], Tensor]]:
    """The floating-point tensors of a nested result, each with its place."""
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield place, result
    elif isinstance(result, tuple | list):
        for i, part in enumerate(result):
            yield from _tensors(part, (*place, i))
    elif hasattr(result, "keys"):
        for key in result.keys():  # noqa: SIM118
            yield from _tensors(result[key], (*place, key))


def _families(calls: list[Call]) -> list[list[Call]]:
    """The calls of numbered modules by their parent, those that hold most parameters first, none inside another."""
    groups: dict[str, list[Call]] = {}
    for call in calls:
        if match := NUMBERED.match(call.path):
            groups.setdefault(match[1] or "", []).append(call)
    outer = {
        parent: group for parent, group in groups.items()
        if not any(_inside(parent, c.path) for other, rest in groups.items() if other != parent for c in rest)
    }  # fmt: skip
    return sorted(outer.values(), key=lambda group: -_numbers(group))


def _inside(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")


def _numbers(group: list[Call]) -> int:
    modules = {id(c.module): c.module for c in group}
    return sum(p.numel() for m in modules.values() for p in m.parameters())


def _whole(family: list[Call], calls: list[Call]) -> tuple[Call, ...]:
    """The family with others beside it that work on a stream of the same shape and look across tokens, in order."""
    kept = {id(c) for c in family}
    shape = family[0].value.shape
    for other in _families(calls):
        if other[0].value.shape == shape and any(_mixes(c) for c in other):
            kept.update(id(c) for c in other)
    return tuple(c for c in calls if id(c) in kept)


def _outermost(calls: list[Call]) -> list[Call]:
    with_parameters = [c for c in calls if any(True for _ in c.module.parameters())]
    paths = {c.path for c in with_parameters}
    return [c for c in with_parameters if not any(p != c.path and _inside(c.path, p) for p in paths)]


def _mixes(call: Call) -> bool:
    """Whether a token's result changes when another token does."""
    stream, axis = call.value, call.axis
    moved = stream.clone()
    moved.select(axis, 0).add_(torch.randn_like(moved.select(axis, 0)))
    with torch.no_grad():
        plain, other = _given(call, stream.clone()), _given(call, moved)
    rest = slice(1, stream.shape[axis])
    changed = (plain - other).abs().movedim(axis, 0)[rest]
    return bool(changed.max() > 1e-5 * plain.abs().max())


def _crosses_sequences(call: Call) -> bool:
    """Whether a sequence's result changes when another sequence of the batch does."""
    stream = call.value[:1].repeat(3, *[1] * (call.value.dim() - 1))
    moved = stream.clone()
    moved[0].add_(torch.randn_like(moved[0]))
    try:
        with torch.no_grad():
            plain, other = _given(call, stream), _given(call, moved)
    except Exception:  # made for one sequence
        return False
    return len(plain) == 3 and bool((plain[1:] - other[1:]).abs().max() > 1e-5 * plain.abs().max())


def _given(call: Call, stream: Tensor) -> Tensor:
    """What the module gives for another stream."""
    args, kwargs = call.called_with(stream)
    found: Tensor = at(call.module(*args, **kwargs), call.result)
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode for a while: no dropout, no running statistics moved."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
