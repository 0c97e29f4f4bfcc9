"""KerasHub's causal language models, edited where they are: their own variables, their own `generate`.

    from blockkit.backends.keras.hub import absorb

    patch = absorb(model, context, query)       # token ids [1, n] and [1, q]
    patch.apply(model)                          # model.generate and model(...) now see the edit
    patch.remove(model)                         # every byte as it was

A KerasHub model counts positions from the start of whatever it is given. So a patch is made for the query alone at
positions 0 to q - 1, which is where `generate`, `predict` and a plain call put it; its targets are the logits that the
query has behind the context, at positions n to n + q - 1. Nothing is assumed of how positions enter (with rotary
positions, which only see distances, reduced runs from 0 and from n are equal on paper). It is exact for the tokens it
is made for, not for those that `generate` adds after the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from keras import ops

from blockkit.absorbing.algorithm import Absorbed
from blockkit.absorbing.algorithm import absorb as absorb_by
from blockkit.absorbing.executor import Executor
from blockkit.absorbing.generation import Experiment, Settings
from blockkit.absorbing.metrics import compare
from blockkit.absorbing.proof import require_exact
from blockkit.absorbing.request import Request
from blockkit.checkpoint.model import stored_name
from blockkit.errors import BadInput
from blockkit.graph.changes import narrowed
from blockkit.graph.graph import Graph
from blockkit.graph.packing import Packing
from blockkit.patch.in_place import Receipt
from blockkit.patch.patch import Patch
from blockkit.progress import Progress, silent

from . import hub_editing
from .arrays import KerasArrays
from .hub_architecture import described, own_streams
from .hub_storage import Parameters, names, without_gradients

__all__ = ["absorb", "in_place", "open_hub", "own_logits"]

PROBE = 8  # tokens on which a description is proved
ROUNDING = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 0.06, "float16": 0.01}  # of one block's largest value


def absorb(
    model: Any,
    context: Any,
    query: Any,
    *,
    strategy: str | None = None,
    tokens: str = "last",
    progress: Progress | None = None,
) -> Patch:
    """Absorbs a context into the weights of a KerasHub causal language model, which is left as it was.

    Args:
        model: a `keras_hub.models.CausalLM`, on any Keras backend.
        context, query: token ids, `[1, n]` and `[1, q]`: any array.
        strategy: how the parameters are chosen; by default as the planner recommends.
        tokens: `last` (exact for the query's last token) or `all` (for every token of the query).
        progress: called with a stage in words and the fraction of it that is done (`print` will do).

    Returns:
        The patch, with the error of the model's own edited run on the query against its own contextual logits.

    Raises:
        BadInput: the model cannot be described, or ids are not `[1, n]`, empty or outside the vocabulary.
        NotPatchable, ConditionViolated: as in `blockkit.absorbing.algorithm.absorb`.
        ExactnessLost: the model's own edited run does not reproduce its contextual logits.
    """
    if tokens == "each":
        raise BadInput(
            "tokens='each' has other weights for every token, which a KerasHub model cannot; use last or all"
        )
    request = Request(_ids(context, "context"), _ids(query, "query"), tokens, start=0)
    everything = np.concatenate([request.context, request.query])
    report = progress or silent
    report("finding the blocks", 0.0)
    executor = open_hub(model, len(everything))
    absorbed = absorb_by(executor, request, strategy, report)
    report("running the contextual and the edited model", 0.0)
    wanted = own_logits(model, everything)[-len(request.served) :]
    patch = _patch(model, executor, absorbed)
    hub_editing.apply(patch, model, True)
    try:
        found = own_logits(model, request.query)[-len(request.served) :]
    finally:
        hub_editing.remove(patch, model)
    measured = compare(found, wanted)
    require_exact(measured, wanted, executor.dtype)
    return replace(patch, measured=asdict(measured))


def open_hub(model: Any, tokens: int = PROBE) -> Executor:
    """The model's blocks, run over its own variables as they are in every run: nothing is copied.

    Args:
        tokens: the longest sequence that will be run.

    Raises:
        BadInput: the model cannot be described, or a block is not what was read off it.
    """
    found = described(model, tokens)
    dtype = str(model.backbone.compute_dtype)
    if dtype not in ROUNDING:
        raise BadInput(f"{model.name} computes in {dtype}; it must be one of {', '.join(ROUNDING)}")
    executor = Executor(found.architecture, KerasArrays(), Parameters(found.stored, dtype), dtype)
    _insist_same(executor, model)
    return executor


def own_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """An ordinary run of the model: ids `[tokens]` to logits `[tokens, vocabulary]`, float32."""
    rows = np.asarray(ids, "int32")[None]
    with without_gradients():
        logits = model({"token_ids": rows, "padding_mask": np.ones_like(rows)}, training=False)
        return np.asarray(ops.convert_to_numpy(ops.cast(logits, "float32")))[0]


def _insist_same(executor: Executor, model: Any) -> None:
    """Proves the description on a few tokens: every block is given what the model's own run gave it.

    Raises:
        BadInput: one of them makes something else of it; the message names the first.
    """
    ids = np.random.default_rng(0).integers(0, int(executor.parameters["embedding"].shape[0]), PROBE)
    at, xp, dtype = np.arange(PROBE), executor.arrays, executor.dtype
    own = own_streams(model, ids)
    streams = [xp.asarray(stream, dtype) for stream in own]
    stages = [("the embedding", executor.embed(ids, at), own[0])]
    for i, layer in enumerate(model.backbone.transformer_layers):
        graph = executor.graph(i)
        packing = Packing(executor.positions(at), (PROBE,))
        found = executor.block(i, {graph.input: streams[i]}, [graph.output], packing)[graph.output]
        stages.append((f"the block {layer.path}", found, own[i + 1]))
    stages.append(("the head", executor.logits(streams[-1]), own_logits(model, ids)))
    for what, mine, wanted in stages:
        apart, scale = float(np.abs(executor.host(mine) - wanted).max()), float(np.abs(wanted).max())
        if not apart <= ROUNDING[dtype] * scale:
            raise BadInput(
                f"{model.name}: {what} is not what its layers say: it gives values up to {scale:.3g}, {apart:.3g} away "
                "from those of what was read off it; it cannot be patched in place, but can be described by a spec"
            )


def _ids(value: Any, what: str) -> np.ndarray:
    found = np.asarray(ops.convert_to_numpy(value))
    if found.ndim != 2 or found.shape[0] != 1 or not np.issubdtype(found.dtype, np.integer):
        raise BadInput(
            f"the {what} must be whole-number token ids of one sequence, [1, n]; got {found.shape} {found.dtype}"
        )
    return found[0].astype(int)


def _patch(model: Any, executor: Executor, absorbed: Absorbed) -> Patch:
    """The changes under the names of the model's own variables."""
    stored = executor.parameters.stored  # type: ignore[attr-defined]
    of, request = names(model, stored), absorbed.request
    slots = {
        stored_name(executor.architecture, layer, name): narrowed(change, executor.dtype)
        for layer, overlay in absorbed.overlays.items()
        for name, change in overlay.items()
    }
    changed = {of[slot]: stored[slot] for slot in slots}
    return Patch(
        {of[slot]: change for slot, change in slots.items()},
        hub_editing.fingerprint(model),
        ", ".join(sorted({p.strategy for p in absorbed.plans.values()})),
        request.tokens,
        len(request.context),
        tuple(int(i) for i in request.query),
        executor.dtype,
        {},
        positions=tuple(int(i) for i in request.reduced_positions),
        transposed=tuple(name for name, s in changed.items() if s.transposed),
    )


class _KerasHub:
    """See `blockkit.patch.in_place.InPlace`."""

    def graphs(self, model: Any, example: Any = None) -> Mapping[str, Graph]:
        """The graphs of the distinct blocks; what the model is called with is known, so `example` plays no part."""
        return open_hub(model).architecture.graphs

    def absorb(self, model: Any, context: Any, query: Any, **options: Any) -> Patch:
        if unknown := [name for name in options if name not in ("strategy", "tokens", "progress")]:
            raise BadInput(
                f"absorb takes no {unknown[0]!r} for a KerasHub model; allowed are strategy, tokens, progress"
            )
        return absorb(model, context, query, **options)

    def experiment(self, model: Any, ids: list[int], settings: Settings) -> Experiment:
        raise BadInput(
            "the generation experiment runs on PyTorch models; of a KerasHub model, absorb the prompt (tokens='all') "
            "and call model.generate with the patch applied"
        )

    def check(self, patch: Patch, model: Any) -> None:
        hub_editing.check(patch, model)

    def apply(self, patch: Patch, model: Any, merge: bool, allow_other_weights: bool = False) -> Receipt:
        return hub_editing.apply(patch, model, merge, allow_other_weights)

    def remove(self, patch: Patch, model: Any) -> None:
        hub_editing.remove(patch, model)


in_place = _KerasHub()
