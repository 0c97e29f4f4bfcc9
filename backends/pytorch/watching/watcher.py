"""A run of the model itself, watched: block by block, what is read and given, at the rows that are served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockkit.progress import Progress, silent

from ..blocks.finding import at, replaced
from ..blocks.traced import Block, Traced
from ..blocks.translate import STREAM, Tap
from ..calling.exclusive import of_this_thread, sole_use
from ..calling.token_rows import batch_rows
from .intercepted import Event
from .interception import intercepting
from .observe import Chosen


@dataclass(frozen=True)
class Rows:
    """Which rows of a run are served: the last `tokens` of each of `batch` sequences."""

    batch: int
    tokens: int

    def of(self, value: Tensor, axis: int) -> Tensor:
        """Those rows, `[batch * tokens, width]`."""
        rows = batch_rows(value.detach(), axis, self.batch)[:, -self.tokens :]
        return rows.reshape(self.batch * self.tokens, -1)


def host(rows: Tensor) -> np.ndarray:
    """Float64 on the host."""
    return np.asarray(rows.to(device="cpu", dtype=torch.float64).numpy())


Again = Callable[[], Tensor]  # runs a block once more, on what it was given


class Finished(Exception):
    """Nothing that is still to run of a forward is of use to anyone."""


@dataclass
class Seen:
    """What one call of a block has shown so far: rows by the graph's names, `[rows, width]`."""

    shown: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[frozenset[str], int] = field(default_factory=dict)  # calls that read the same parameters


@dataclass
class Watcher:
    """Follows a run through the blocks; subclasses act on what it shows.

    Attributes:
        report, stage: what is told, as each block begins, under which name.
        chosen: by place of the block: its plan, and the taps that are watched; None for a block left alone.
    """

    model: nn.Module
    traced: Traced
    rows: Rows
    chosen: Mapping[int, Chosen | None]
    place: int = -1
    seen: dict[int, Seen] = field(default_factory=dict)
    report: Progress = silent
    stage: str = ""

    def entered(self, place: int, stream: Tensor) -> None:
        """A block is about to run on `stream`."""
        self.place = place
        self.report(self.stage, place / len(self.traced.blocks))
        self.seen[place] = Seen({STREAM: self.rows.of(stream, self.traced.blocks[place].axis).clone()})

    def left(self, place: int, stream: Tensor, again: Again) -> Tensor | None:
        """A block gave `stream`, and gives it `again` when asked; gives what is to take its place, or None."""
        block = self.traced.blocks[place]
        self.seen[place].shown[block.graph.output] = self.rows.of(stream, block.axis).clone()
        return None

    def read(self, tap: Tap, event: Event) -> Tensor | None:
        """A watched call read parameters; gives what is to take the place of its result, or None."""
        self.note(tap, event, event.output)
        return None

    def note(self, tap: Tap, event: Event, output: Tensor) -> None:
        """Keeps the served rows of what the call read and gave."""
        shown = self.seen[self.place].shown
        for (name, axis), value in zip(tap.signals, event.signals, strict=False):
            if name not in shown:
                shown[name] = self.rows.of(value, axis).clone()
        shown[tap.output[0]] = self.rows.of(output, tap.output[1]).clone()

    # -- the run -----------------------------------------------------------------------------------

    def watched(self, place: int) -> tuple[Tap, ...]:
        chosen = self.chosen.get(place)
        return chosen.taps if chosen is not None else ()

    def event(self, event: Event) -> Tensor | None:
        """Finds the tap of an intercepted call."""
        if self.place < 0:
            return None
        block = self.traced.blocks[self.place]
        start = len(block.path) + 1 if block.path else 0
        if not all(n.startswith(f"{block.path}." if block.path else "") for n in event.names):
            return None
        names = frozenset(n[start:] for n in event.names)
        watched = self.watched(self.place)
        mine = frozenset().union(*(t.parameters for t in watched))
        same = [t for t in block.taps if t.parameters & mine == names]
        seen = self.seen[self.place]
        number = seen.counts.get(names, 0)
        seen.counts[names] = number + 1
        told = number < len(same) and same[number] in watched and same[number].output[0]
        return self.read(same[number], event) if told else None

    def names(self) -> list[str]:
        """The parameters whose calls are watched, in the state dict's names."""
        found = {
            self.traced.blocks[place].full(p): None
            for place in range(len(self.traced.blocks)) for tap in self.watched(place) for p in sorted(tap.parameters)
        }  # fmt: skip
        return list(found)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Everything the model runs meanwhile is watched."""
        with (
            sole_use(self.model),
            _hooked(self.model, self.traced, self.entered, self.left),
            intercepting(self.model, self.names(), self.event),
        ):
            yield


@contextmanager
def _hooked(
    model: nn.Module,
    traced: Traced,
    entered: Callable[[int, Tensor], None],
    left: Callable[[int, Tensor, Again], Tensor | None],
) -> Iterator[None]:
    """Tells of the blocks' calls, by their place in the model's order."""
    places = {(b.path, b.number): i for i, b in enumerate(traced.blocks)}
    counts: dict[str, int] = {}

    def before(block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            number = counts[block.path] = counts.get(block.path, -1) + 1
            place = places.get((block.path, number))
            if place is not None:
                entered(place, args[block.stream] if isinstance(block.stream, int) else kwargs[block.stream])

        return hook

    def after(block: Block) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
            place = places.get((block.path, counts[block.path]))
            if place is None:
                return None

            def again() -> Tensor:
                return at(module.forward(*args, **kwargs), block.result)

            other = left(place, at(result, block.result), again)
            return None if other is None else replaced(result, block.result, other)

        return hook

    modules = dict(model.named_modules())
    with ExitStack() as hooks:
        for block in {b.path: b for b in traced.blocks}.values():
            module = modules[block.path]
            hooks.enter_context(
                module.register_forward_pre_hook(of_this_thread(before(block)), with_kwargs=True, prepend=True)
            )
            hooks.enter_context(module.register_forward_hook(of_this_thread(after(block)), with_kwargs=True))
        yield
