"""What the zoo measures of one class: facts of its runs, and a context absorbed into it.

Every error is the largest difference of a logit of the query's last token from what the class gives for context and
query together; every run is an ordinary call.
"""

from __future__ import annotations

import inspect
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import zoo_models
from torch import Tensor, nn

from blockkit.backends.pytorch import absorb
from blockkit.backends.pytorch.blocks.traced import trace

CONTEXT, QUERY = 12, 3
WORST, LEAST = 10, 1000  # of the floor: how far a patched run may be off at most, and an unpatched one must at least
EQUAL = 1e-3  # of the largest logit: runs further apart than this are not equal on paper, whatever they should be
CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
STRATEGIES = (None, "matrix")


@dataclass(frozen=True)
class Facts:
    """How a class runs.

    Attributes:
        parameters: how many numbers it has.
        positions: whether `forward` takes `position_ids`.
        causal: whether earlier logits stay when a later token changes.
        scale: its largest logit.
        floors: differences of contextual runs that are equal on paper, by what differs between them.
        unequal: those that are not, although they should be.
    """

    parameters: int
    positions: bool
    causal: bool
    scale: float
    floors: Mapping[str, float]
    unequal: Mapping[str, float]

    @property
    def floor(self) -> float:
        """The largest of them; where all are zero, one rounding of the largest logit."""
        return max(self.floors.values(), default=0.0) or float(np.spacing(np.float32(self.scale)))


@dataclass(frozen=True)
class Patched:
    """A context absorbed by one strategy, or why not.

    Attributes:
        strategy: the one that was asked for; None for the default.
        moved: the parameters that were changed, for each kind of block.
        error: with the patch on the model.
        merged: of a model made anew that has the edited weights.
        unpatched: without the patch.
        inside: whether any parameter of a block was changed, and not only others, as the last norm.
    """

    strategy: str | None
    moved: tuple[str, ...] = ()
    error: float | None = None
    merged: float | None = None
    unpatched: float | None = None
    inside: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One class; `reason` says why what is missing is missing."""

    name: str
    reason: str = ""
    facts: Facts | None = None
    blocks: tuple[str, ...] = ()
    patches: tuple[Patched, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def patched(self) -> bool:
        """Whether the planner's default reproduces the context: see `exact`."""
        return self.facts is not None and bool(self.patches) and exact(self.patches[0], self.facts.floor)


def exact(patch: Patched, floor: float) -> bool:
    """Whether both patched runs are as good as a contextual one, and an unpatched run is not."""
    if patch.error is None or patch.merged is None or patch.unpatched is None:
        return False
    return max(patch.error, patch.merged) <= WORST * floor and patch.unpatched >= LEAST * floor


def examined(name: str, absorbing: bool = True, note: Callable[[Row], None] = lambda row: None) -> Row:
    """Builds a class, runs it, absorbs a context into it.

    Args:
        note: is shown the row whenever it grows, so that what was found stays if the rest takes too long.
    """
    row, start = Row(name), time.monotonic()
    try:
        model = zoo_models.build(name)
        row = replace(row, seconds={"build": round(time.monotonic() - start, 2)})
    except Exception as error:
        return replace(row, reason=f"not built: {said(error)}")
    ids = prompt()
    try:
        row = replace(row, facts=facts_of(model, ids))
    except Exception as error:
        return replace(row, reason=f"does not run on ids alone: {said(error)}")
    note(row)
    if not absorbing:
        return row
    try:
        row = replace(row, blocks=blocks_of(model))
    except Exception as error:
        return replace(row, reason=f"blocks: {said(error)}")
    for strategy in STRATEGIES:
        note(row)
        row = replace(row, patches=(*row.patches, absorbed(name, model, ids, strategy)))
    return replace(row, reason=row.patches[0].reason)


def said(error: BaseException) -> str:
    """An exception in one line."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    print(f"{_said_at(error)}\n{error}", file=sys.stderr)
    return f"{type(error).__name__}: {' '.join(lines[:2])[:240] if lines else 'no message'}"


def _said_at(error: BaseException) -> str:
    """The last places in the code on the way to an exception, the innermost last."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " > ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames)


def prompt() -> Tensor:
    """Context and query `[1, n]`: ordinary ids, each once."""
    ordinary = torch.tensor(zoo_models.ORDINARY)
    order = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(1))
    return ordinary[order[: CONTEXT + QUERY]][None]


# -- facts -----------------------------------------------------------------------------------------


def facts_of(model: nn.Module, ids: Tensor) -> Facts:
    """Runs the model in all the ways that should make no difference, and in one that should."""
    whole = logits(model, ids)
    if whole.dim() != 3 or whole.shape[:2] != ids.shape:
        raise ValueError(f"ids {tuple(ids.shape)} give logits {tuple(whole.shape)}")
    if not whole.isfinite().all():
        raise ValueError("the logits are not finite")
    last, scale = whole[0, -1], float(whole.abs().max())
    other = ids.clone()
    other[0, -1] = zoo_models.ORDINARY[0]
    found = {way: float((run - last).abs().max()) for way, run in equal_runs(model, ids)}
    return Facts(
        sum(p.numel() for p in model.parameters()),
        "position_ids" in inspect.signature(model.forward).parameters,
        float((logits(model, other)[0, :-1] - whole[0, :-1]).abs().max()) <= EQUAL * scale,
        scale,
        {way: apart for way, apart in found.items() if apart <= EQUAL * scale},
        {way: apart for way, apart in found.items() if not apart <= EQUAL * scale},
    )


def equal_runs(model: nn.Module, ids: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The last token's logits `[vocabulary]` of contextual runs that are equal on paper to the plain one."""
    for way, run in (("cache", _cached), ("batch", _batched), ("eager", _eager)):
        try:
            found = run(model, ids)
        except Exception:  # a way of running that the class does not have
            continue
        if found is not None:
            yield way, found


def _cached(model: nn.Module, ids: Tensor) -> Tensor | None:
    """The context first, then the query token by token with what is kept of those before, as in generation."""
    takes = inspect.signature(model.forward).parameters
    with torch.no_grad():
        result = model(ids[:, :CONTEXT], use_cache=True)
        name = next((n for n in CACHES if n in takes and getattr(result, n, None) is not None), None)
        if name is None:
            return None
        for place in range(CONTEXT, ids.shape[1]):
            result = model(ids[:, place : place + 1], use_cache=True, **{name: getattr(result, name)})
    return result.logits[0, -1]


def _batched(model: nn.Module, ids: Tensor) -> Tensor:
    """Beside another prompt."""
    return logits(model, torch.cat([ids, ids.flip(1)]))[0, -1]


def _eager(model: nn.Module, ids: Tensor) -> Tensor | None:
    """With attention written out."""
    config: Any = model.config
    before = config._attn_implementation
    if before == "eager":
        return None
    model.set_attn_implementation("eager")
    try:
        return logits(model, ids)[0, -1]
    finally:
        model.set_attn_implementation(before)


def logits(model: nn.Module, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """An ordinary call, `[1, n, vocabulary]`; positions are given where the class takes them."""
    takes = inspect.signature(model.forward).parameters
    given = {} if positions is None or "position_ids" not in takes else {"position_ids": positions}
    with torch.no_grad():
        return model(ids, **given).logits


# -- a context absorbed ----------------------------------------------------------------------------


def absorbed(name: str, model: nn.Module, ids: Tensor, strategy: str | None) -> Patched:
    """Absorbs the context, and runs the edited model on the query alone: as it was absorbed, and as ordinary weights.

    The latter is a second model of the class, made anew and given the edited weights: nothing else can hold the
    context. Once the patch is off, every number of the first has to be as it was.
    """
    context, query = ids[:, :CONTEXT], ids[:, CONTEXT:]
    wanted = logits(model, ids)[0, -1]
    fresh = zoo_models.build(name)
    before = {key: tensor.clone() for key, tensor in fresh.state_dict().items()}
    try:
        patch = absorb(model, context, query, strategy=strategy)
        positions = patch.position_ids
        unpatched = logits(model, query, positions)[0, -1]
        with patch.applied(model):
            found = logits(model, query, positions)[0, -1]
        with patch.applied(model, merge=True):
            fresh.load_state_dict(model.state_dict())
        merged = logits(fresh, query, positions)[0, -1]
    except Exception as error:
        return Patched(strategy, reason=said(error))
    changed = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])]
    if changed:
        return Patched(strategy, reason=f"not restored: {', '.join(changed[:3])}")
    beside, as_weights, without = (float((run - wanted).abs().max()) for run in (found, merged, unpatched))
    moved, inside = moved_by(model, patch.changes)
    return Patched(strategy, moved, beside, as_weights, without, inside)


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """The paths of the blocks' calls, in order."""
    return tuple(block.path for block in trace(model).blocks)


def moved_by(model: nn.Module, changes: Mapping[str, Any]) -> tuple[tuple[str, ...], bool]:
    """The changed parameters, for each set of names within a block how many blocks have it; whether there are such."""
    paths = sorted({path for path in blocks_of(model) if path}, key=len, reverse=True)
    by_block: dict[str, list[str]] = {}
    for name in changes:
        path = next((p for p in paths if name.startswith(f"{p}.")), "")
        by_block.setdefault(path, []).append(name.removeprefix(f"{path}.").removesuffix(".weight"))
    outside = tuple(f"outside the blocks: {name}" for name in sorted(by_block.pop("", [])))
    counts = Counter(" + ".join(sorted(names)) for names in by_block.values())
    return (*(f"{count} x {names}" for names, count in counts.items()), *outside), bool(by_block)
