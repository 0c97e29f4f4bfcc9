"""Where the blocks of a model are: found by an ordinary run, by structure, not by name.

The residual stream runs through modules that give back the shape they got. Those under one parent with numbers for
names (`model.layers.3`), outermost first, of which at least one looks across tokens, are the blocks. A module that
has none is a block itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockkit.errors import BadInput

from .calling import leaves

Key = int | str
NUMBERED = re.compile(r"^(?:(.*)\.)?(\d+)$")


@dataclass(frozen=True)
class Call:
    """One call of a module through which the residual stream runs.

    Attributes:
        path: the module's, in the model; empty for the model itself.
        stream: where the stream `[..., tokens, d_model]` is among the arguments: a position or a keyword.
        result: where it is in the result: positions and keys, from the outside in.
        number: how many calls of the same module came before.
    """

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stream: Key
    result: tuple[Key, ...]
    number: int
    out: Tensor

    @property
    def value(self) -> Tensor:
        """The stream that was read."""
        found = self.args[self.stream] if isinstance(self.stream, int) else self.kwargs[self.stream]
        return found  # type: ignore[no-any-return]

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
        changed = [*value[: place[0]], inner, *value[place[0] + 1 :]]  # type: ignore[operator, misc]
        return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    value[place[0]] = inner
    return value


def find_blocks(model: nn.Module, run: Callable[[], Any], tokens: int) -> tuple[Call, ...]:
    """The calls of the model's blocks in `run`, a forward of `tokens` tokens, in order.

    Raises:
        BadInput: nothing in it keeps the residual stream's shape and looks across tokens.
    """
    calls = _observed(model, run, tokens)
    for family in _families(calls):
        if any(_mixes(call) for call in _one_of_each(family)):
            return _whole(family, calls)
    whole = [c for c in calls if not c.path]
    single = whole or [c for c in _outermost(calls) if _mixes(c)]
    if not single:
        seen = ", ".join(sorted({c.path for c in calls})[:8]) or "none"
        raise BadInput(
            f"no blocks were found in {type(model).__name__}: no module gives back a residual stream of the shape it "
            f"got and looks across tokens (modules that keep the shape: {seen})"
        )
    return tuple(single)


def _observed(model: nn.Module, run: Callable[[], Any], tokens: int) -> list[Call]:
    """Every call that reads and gives floating-point tensors of one shape with a token axis, in order of their start."""
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
                found[place] = Call(path, module, args, dict(kwargs), stream, where, number, out)

        return hook

    hooks = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after(path), with_kwargs=True))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return [c for c in found if c is not None]


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
        if other[0].value.shape == shape and any(_mixes(c) for c in _one_of_each(other)):
            kept.update(id(c) for c in other)
    return tuple(c for c in calls if id(c) in kept)


def _outermost(calls: list[Call]) -> list[Call]:
    with_parameters = [c for c in calls if any(True for _ in c.module.parameters())]
    paths = {c.path for c in with_parameters}
    return [c for c in with_parameters if not any(p != c.path and _inside(c.path, p) for p in paths)]


def _one_of_each(family: list[Call]) -> list[Call]:
    """A call of each class of modules in it."""
    return list({type(c.module): c for c in family}.values())


def _mixes(call: Call) -> bool:
    """Whether a token's result changes when another token does."""
    stream = call.value
    axis = stream.dim() - 2
    if stream.shape[axis] < 2:
        return False
    moved = stream.clone()
    moved.select(axis, 0).add_(torch.randn_like(moved.select(axis, 0)))
    with torch.no_grad():
        args, kwargs = call.called_with(stream.clone())
        plain = at(call.module(*args, **kwargs), call.result)
        args, kwargs = call.called_with(moved)
        other = at(call.module(*args, **kwargs), call.result)
    rest = slice(1, stream.shape[axis])
    changed = (plain - other).abs().movedim(axis, 0)[rest]
    return bool(changed.max() > 1e-5 * plain.abs().max())


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


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors among nested arguments."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]
