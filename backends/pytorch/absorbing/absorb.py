"""Absorb a context into a model in memory: Algorithm 1, and its proof by an ordinary run of the edited model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockkit.absorbing.metrics import Comparison, compare
from blockkit.absorbing.proof import require_exact
from blockkit.absorbing.request import MODES
from blockkit.errors import BadInput, ExactnessLost
from blockkit.graph.graph import Globs, globs
from blockkit.progress import Progress, silent

from ..blocks.traced import Traced, trace
from ..calling.arguments import Retained, decoder_ids, keywords, places
from ..calling.exclusive import sole_use
from ..calling.interface import Interface
from ..calling.numbers import readable
from ..calling.prompts import Prompt, joined, require_fitting, require_ready
from ..editing.identity import fingerprint, introduce
from ..editing.patch import TorchPatch
from ..editing.proving import worn
from ..watching.observe import Chosen
from ..watching.watcher import Finished, Rows, Seen, Watcher
from .lockstep import NeverRead, Solver, Task, plans
from .places import placed, require_held, require_padding_unseen
from .run import call, model_dtype


@dataclass(frozen=True)
class Runs:
    """The two runs that are to agree.

    Attributes:
        contextual: everything.
        reduced: what stays; its last tokens are the query's.
        query: how many tokens the query has.
        served: how many of the last tokens are to be exact.
        more: further arguments of the contextual call, and of the reduced one.
    """

    contextual: Prompt
    reduced: Prompt
    query: int
    served: int
    more: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})


def absorb(
    model: nn.Module,
    context: Tensor,
    query: Tensor,
    *,
    strategy: str | None = None,
    tokens: str = "last",
    retain: Retained | None = None,
    merge: bool = False,
    freeze: Globs = (),
    context_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    inputs: Mapping[str, Any] | None = None,
    context_inputs: Mapping[str, Any] | None = None,
    example: Any = None,
    progress: Progress | None = None,
) -> TorchPatch:
    """Absorbs the context into the parameters that the strategy chooses, in place of running it again.

    With `patch.applied(model)`, `model(query, position_ids=patch.position_ids)` gives what
    `model(torch.cat([context, query], 1))` gave on the query's tokens. The model itself is left as it was.

    Args:
        context: what is removed: ids `[batch, n]`, or embeddings `[batch, n, d_model]` of anything (images).
        query: what stays, at its positions: ids `[batch, q]` (or embeddings). Several prompts each get changes of
            their own, except with `tokens="all"`, where one set of weights serves all of them.
        strategy: `paper`, `minimal`, `matrix`, `stable` or `joint`; by default `stable`, or `joint` for many tokens.
        tokens: `last` (for the query's last token), `each` (for every token a patch of its own) or `all` (one static
            patch for all of them).
        retain: places in the context that stay: they run before the query, through the edited weights.
        merge: solve for weights into which the change is rounded, which also takes up what that rounding leaves.
        freeze: one glob or several of parameter names, within a block, that may not move.
        context_mask, query_mask: `[batch, n]`, `[batch, q]`, 0 for padding on the left.
        decoder_input_ids: `[batch, t]`, for an encoder-decoder model: context and query are then what the encoder
            reads, and the patch is exact for the decoder's tokens.
        inputs: further arguments that the model is called with, context or not (the `memory` that it looks at).
        context_inputs: further arguments of the contextual call alone (`pixel_values`).
        example: see `trace`.
        progress: called with a stage in words and the fraction of it that is done (`print` will do).

    Raises:
        BadInput: something given does not fit; the message says what is allowed.
        NotPatchable: a block has no route that serves that many tokens.
        ConditionViolated: a value condition does not hold at some block.
        ExactnessLost: the edited model's own run does not reproduce the contextual one.
    """
    interface = require_ready(model)
    if tokens not in MODES:
        raise BadInput(f"tokens={tokens!r}; allowed are {', '.join(MODES)}")
    whole = joined(model, context, query, (context_mask, query_mask))
    kept, held = places(retain, int(context.shape[1])), globs("freeze", freeze)
    both = keywords("inputs", inputs)
    decoder = decoder_ids(decoder_input_ids, len(query))
    if decoder:
        if "decoder_input_ids" not in interface.takes:
            raise BadInput(f"{type(model).__name__}.forward takes no decoder_input_ids: it is no encoder-decoder model")
        require_fitting(model, "decoder_input_ids", decoder_input_ids)
    own = {**both, **decoder}
    more = {**own, **keywords("context_inputs", context_inputs)}
    report = progress or silent
    report("finding the blocks", 0.0)
    traced = trace(model, (_of_one(both, len(query)) or None) if example is None else example)
    whole = replace(whole, positions=whole.positions + traced.first)
    runs = _runs(placed(model, interface, traced, whole, more), query, kept, tokens, (more, own))
    require_padding_unseen(model, interface, runs.contextual, more)
    require_held(model, interface, traced, runs.reduced, own)
    task = _task(runs, strategy, tokens, merge, held)
    capacity = None if task.per_row else runs.reduced.batch * runs.served
    while True:
        try:
            return _absorbed(model, interface, traced, runs, task, tokens, capacity, report)
        except NeverRead as error:  # then another parameter has to do
            task = replace(task, frozen=(*task.frozen, error.parameter))


def _absorbed(
    model: nn.Module,
    interface: Interface,
    traced: Traced,
    runs: Runs,
    task: Task,
    tokens: str,
    capacity: int | None,
    report: Progress,
) -> TorchPatch:
    traced, chosen = plans(traced, task, capacity)
    rows = Rows(runs.reduced.batch, runs.served)
    with torch.no_grad(), sole_use(model):
        wanted, target = contextual_run(model, interface, traced, chosen, runs, rows, report)
        solver = Solver(
            model, traced, rows, chosen, task=task, target=target, capacity=capacity,
            dtype=model_dtype(model), stored=originals(model), length=_length(runs),
            report=report, stage="absorbing",
        )  # fmt: skip
        with suppress(Finished), solver.watching():
            call(model, interface, runs.reduced, rows.tokens, runs.more[1])
        solver.require_all()
        before = runs.contextual.length - runs.query
        report("running the edited model", 0.0)
        patch = absorbed_patch(model, interface, task, solver, tokens, before, runs.reduced)
        with worn(patch, model):
            own = call(model, interface, runs.reduced, rows.tokens, runs.more[1])
        target_rows = _real(wanted, runs)
        measured = compare(_real(own, runs), target_rows)
        _insist(measured, model, interface, runs, target_rows)
    return replace(patch, measured=asdict(measured))


def contextual_run(
    model: nn.Module,
    interface: Interface,
    traced: Traced,
    chosen: Mapping[int, Chosen | None],
    runs: Runs,
    rows: Rows,
    report: Progress = silent,
) -> tuple[Tensor, dict[int, Seen]]:
    """The logits `[batch, served, vocabulary]` of the contextual run, and what every block showed."""
    watcher = Watcher(model, traced, rows, chosen, report=report, stage="running the contextual model")
    with watcher.watching():
        logits = call(model, interface, runs.contextual, rows.tokens, runs.more[0])
    return logits, watcher.seen


def _runs(
    whole: Prompt, query: Tensor, kept: Tensor, tokens: str, more: tuple[Mapping[str, Any], Mapping[str, Any]]
) -> Runs:
    q, device = int(query.shape[1]), whole.value.device
    n = whole.length - q
    reduced = whole.kept(torch.cat([kept.to(device), torch.arange(n, n + q, device=device)]))
    if reduced.mask is not None and bool((reduced.mask.diff(dim=1) < 0).any()):
        raise BadInput(
            "padding between retained context and query cannot be told by a patch; absorb prompts of one length"
        )
    if len(kept) and reduced.mask is None:  # without it, a jump in positions may pass for another sequence
        reduced = replace(reduced, mask=torch.ones(reduced.value.shape[:2], dtype=torch.long, device=device))
    if not query.is_floating_point() and whole.value.is_floating_point() and not len(kept):
        reduced = replace(reduced, value=query)  # the ordinary call of the edited model reads ids
    decoder = more[1].get("decoder_input_ids")
    length = q if decoder is None else int(decoder.shape[1])
    return Runs(whole, reduced, q, 1 if tokens == "last" else length, more)


def _of_one(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The arguments for the first sequence alone, as a short run to find the blocks wants them."""

    def first(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.dim() and len(value) == batch else value

    return {name: first(value) for name, value in inputs.items()}


def _length(runs: Runs) -> int:
    """How many tokens the blocks of the reduced run see in each sequence."""
    decoder = runs.more[1].get("decoder_input_ids")
    return int(decoder.shape[1]) if isinstance(decoder, Tensor) else runs.reduced.length


def _task(runs: Runs, strategy: str | None, tokens: str, merge: bool, frozen: tuple[str, ...]) -> Task:
    per_row = tokens == "each" or (tokens == "last" and runs.reduced.batch > 1)
    if merge and per_row:
        raise BadInput("changes that differ between tokens or prompts cannot be merged; leave merge=False")
    mask = runs.reduced.mask
    ignored = None
    if mask is not None and tokens != "last":
        ignored = (mask[:, -runs.served :] == 0).reshape(-1).cpu().numpy()
        ignored = ignored if ignored.any() else None
    return Task(strategy, per_row, merge, tokens == "each", ignored, frozen, runs.reduced.batch)


def originals(model: nn.Module) -> Callable[[str], Tensor]:
    """The model's parameters and buffers, by name in the state dict."""
    held = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    known = dict(held)
    return lambda name: readable(name, known[name])


def absorbed_patch(
    model: nn.Module, interface: Interface, task: Task, solver: Solver, tokens: str, context: int, reduced: Prompt
) -> TorchPatch:
    """The patch of what a solver found for the reduced prompt; it has not been measured yet."""
    transposed = tuple(
        block.full(p) for block in solver.traced.blocks for p, lies in block.stored.items()
        if lies.transposed and block.full(p) in solver.changes
    )  # fmt: skip
    ids = reduced.value if not reduced.value.is_floating_point() else torch.full(reduced.value.shape[:2], -1)
    positions = reduced.positions if "position_ids" in interface.takes else torch.arange(reduced.length).expand_as(ids)
    pads = [] if reduced.mask is None else [int(p) for p in (reduced.mask == 0).sum(1)]
    patch = TorchPatch(
        solver.changes,
        fingerprint(model),
        ", ".join(sorted(solver.strategies)),
        tokens,
        context,
        tuple(int(i) for i in ids.flatten().tolist()),
        model_dtype(model),
        {},
        batch=reduced.batch,
        padding=tuple(pads) if any(pads) else (),
        positions=tuple(int(i) for i in positions.flatten().tolist()),
        transposed=transposed,
        merged=task.merge,
        device=str(reduced.value.device),
    )
    introduce(model, patch)
    return patch


def _real(logits: Tensor, runs: Runs) -> np.ndarray:
    """The rows of tokens that are no padding, `[rows, vocabulary]`, on the host."""
    mask = runs.reduced.mask
    flat = logits.float() if logits.dtype != torch.float64 else logits
    if mask is not None and logits.shape[1] > 1:
        flat = flat[mask[:, -logits.shape[1] :] == 1]
    return np.asarray(flat.reshape(-1, logits.shape[-1]).cpu().numpy())


def _insist(measured: Comparison, model: nn.Module, interface: Interface, runs: Runs, wanted: np.ndarray) -> None:
    """Refuses a patch that its own run does not prove; says so if no run could."""

    def off(prompt: Prompt, more: Mapping[str, Any]) -> float:
        with torch.no_grad():
            found = call(model, interface, prompt, runs.served, more)
        return compare(_real(found, runs), wanted).linf

    try:
        require_exact(measured, wanted, model_dtype(model), lambda: off(runs.reduced, runs.more[1]))
    except ExactnessLost:
        if again := off(runs.contextual, runs.more[0]):
            raise ExactnessLost(
                f"two runs of {type(model).__name__} on the same input differ by {again:.3g}, so nothing can be exact "
                f"(the patched one by {measured.linf:.3g}): it draws at random, or remembers earlier runs"
            ) from None
        raise
