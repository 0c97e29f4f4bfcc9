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

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops

from blockkit.algorithm import LOOSEST, Absorbed
from blockkit.algorithm import absorb as absorb_by
from blockkit.checkpoint import stored_name
from blockkit.errors import BadInput, ExactnessLost
from blockkit.executor import Executor
from blockkit.graph import Graph
from blockkit.in_place import Receipt
from blockkit.metrics import compare
from blockkit.overlay import Change, MatrixChange, VectorChange
from blockkit.patch import Patch
from blockkit.request import Request
from blockkit.run import logits_of, run_stream

from . import hub_editing
from .arrays import KerasArrays
from .hub_architecture import described
from .hub_storage import Parameters, names

__all__ = ["absorb", "in_place", "open_hub", "own_logits"]

PROBE = 8  # tokens on which a description is proved
ROUNDING = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}  # of the largest logit


def absorb(model: Any, context: Any, query: Any, *, strategy: str | None = None, tokens: str = "last") -> Patch:
    """Absorbs a context into the weights of a KerasHub causal language model, which is left as it was.

    Args:
        model: a `keras_hub.models.CausalLM`, on any Keras backend.
        context, query: token ids, `[1, n]` and `[1, q]`: any array.
        strategy: how the parameters are chosen; by default as the planner recommends.
        tokens: `last` (exact for the query's last token) or `all` (for every token of the query).

    Returns:
        The patch, with the error of the model's own edited run on the query against its own contextual logits.

    Raises:
        BadInput: the model cannot be described, or ids are not `[1, n]`, empty or outside the vocabulary.
        NotPatchable, ConditionViolated: as in `blockkit.algorithm.absorb`.
        ExactnessLost: the model's own edited run does not reproduce its contextual logits.
    """
    if tokens == "each":
        raise BadInput("tokens='each' has other weights for every token, which a KerasHub model cannot; use last or all")
    request = Request(_ids(context, "context"), _ids(query, "query"), tokens, start=0)
    everything = np.concatenate([request.context, request.query])
    executor = open_hub(model, len(everything))
    absorbed = absorb_by(executor, request, strategy)
    wanted = own_logits(model, everything)[-len(request.served) :]
    _insist_same(executor, model, absorbed.contextual, wanted)
    patch = _patch(model, executor, absorbed)
    hub_editing.apply(patch, model, True)
    try:
        found = own_logits(model, request.query)[-len(request.served) :]
    finally:
        hub_editing.remove(patch, model)
    measured, scale = compare(found, wanted), float(np.abs(wanted).max())
    if not measured.linf <= LOOSEST[executor.dtype] * scale:
        raise ExactnessLost(
            f"the edited model's own run is {measured.linf:.3g} away from the contextual logits (which reach {scale:.3g})"
            f": the plan is ill-conditioned here in {executor.dtype}; choose another strategy or dtype"
        )
    return replace(patch, measured={k: getattr(measured, k) for k in ("linf", "tvd", "top1_agree")})


def open_hub(model: Any, tokens: int = PROBE) -> Executor:
    """The model's blocks, run over its own variables as they are in every run: nothing is copied.

    Args:
        tokens: the longest sequence that will be run.

    Raises:
        BadInput: the model cannot be described, or its description does not give its own logits.
    """
    dtype = str(keras.backend.standardize_dtype(model.compute_dtype))
    if dtype not in ROUNDING:
        raise BadInput(f"{model.name} computes in {dtype}; it must be one of {', '.join(ROUNDING)}")
    found = described(model, tokens)
    executor = Executor(found.architecture, KerasArrays(), Parameters(found.stored, dtype), dtype)
    vocabulary = int(model.backbone.token_embedding.embeddings.shape[0])
    ids = np.random.default_rng(0).integers(0, vocabulary, PROBE)
    mine = logits_of(executor, run_stream(executor, ids, np.arange(PROBE)))
    _insist_same(executor, model, mine, own_logits(model, ids))
    return executor


def own_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """An ordinary run of the model: ids `[tokens]` to logits `[tokens, vocabulary]`, float32."""
    rows = np.asarray(ids, "int32")[None]
    with _without_gradients():
        logits = model({"token_ids": rows, "padding_mask": np.ones_like(rows)}, training=False)
        return np.asarray(ops.convert_to_numpy(ops.cast(logits, "float32")))[0]


def _without_gradients() -> contextlib.AbstractContextManager[Any]:
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def _insist_same(executor: Executor, model: Any, mine: np.ndarray, own: np.ndarray) -> None:
    apart, scale = float(np.abs(mine - own).max()), float(np.abs(own).max())
    if not apart <= ROUNDING[executor.dtype] * scale:
        raise BadInput(
            f"{model.name} is not what its layers say: on {len(own)} token(s) its own logits are {apart:.3g} away from "
            f"those of the blocks read off its {type(model.backbone).__name__} (they reach {scale:.3g}); it cannot be "
            "patched in place, but its blocks can be judged by a spec"
        )


def _ids(value: Any, what: str) -> np.ndarray:
    found = np.asarray(ops.convert_to_numpy(value))
    if found.ndim != 2 or found.shape[0] != 1 or not np.issubdtype(found.dtype, np.integer):
        raise BadInput(f"the {what} must be whole-number token ids of one sequence, [1, n]; got {found.shape} {found.dtype}")
    return found[0].astype(int)


def _patch(model: Any, executor: Executor, absorbed: Absorbed) -> Patch:
    """The changes under the names of the model's own variables."""
    stored = executor.parameters.stored  # type: ignore[attr-defined]
    of, request = names(model, stored), absorbed.request
    slots = {
        stored_name(executor.architecture, layer, name): _narrow(change)
        for layer, overlay in absorbed.overlays.items()
        for name, change in overlay.items()
    }
    changed = {of[slot]: stored[slot] for slot in slots}
    return Patch(
        {of[slot]: change for slot, change in slots.items()},
        hub_editing.fingerprint(model, changed, changed),
        ", ".join(sorted({p.strategy for p in absorbed.plans.values()})),
        request.tokens,
        len(request.context),
        tuple(int(i) for i in request.query),
        executor.dtype,
        {},
        positions=tuple(int(i) for i in request.reduced_positions),
        transposed=tuple(name for name, s in changed.items() if s.transposed),
    )


def _narrow(change: Change) -> Change:
    """The change as files hold it: float32."""
    if isinstance(change, MatrixChange):
        return MatrixChange(*(np.ascontiguousarray(f, np.float32) for f in (change.left, change.right)))
    return VectorChange(np.ascontiguousarray(change.delta, np.float32))


class _KerasHub:
    """See `blockkit.in_place.InPlace`."""

    def graphs(self, model: Any, example: Any = None) -> Mapping[str, Graph]:
        """The graphs of the distinct blocks; what the model is called with is known, so `example` plays no part."""
        return open_hub(model).architecture.graphs

    def apply(self, patch: Patch, model: Any, merge: bool) -> Receipt:
        return hub_editing.apply(patch, model, merge)

    def remove(self, patch: Patch, model: Any) -> None:
        hub_editing.remove(patch, model)


in_place = _KerasHub()
