"""What a patch's error is judged against: the unpatched model and the recompute floor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .algorithm import Absorbed, run_query
from .executor import Executor
from .metrics import Comparison, compare
from .request import Request
from .run import fill_cache, logits_of, run_stream, sees_later


@dataclass(frozen=True)
class Reference:
    """What a patch's error is judged against, for the same model, dtype and tokens.

    Attributes:
        unpatched: the model without the context and without a patch.
        factored: the edited model with its changes kept as factors; None where that is what was run.
        floor: contextual runs that are equal on paper; see `recomputed`.
        without: logits of the unpatched run, `[served, vocabulary]`.
    """

    unpatched: Comparison
    factored: Comparison | None
    floor: Comparison
    without: np.ndarray


def measure(executor: Executor, absorbed: Absorbed) -> Reference:
    """Runs the unpatched model, the factored patch, and the contextual model in other ways."""
    request, first = absorbed.request, absorbed.request.served[0]
    without = logits_of(executor, run_query(executor, request, None)[first:])
    factored = None
    if request.merge:
        kept = run_query(executor, request, absorbed.overlays, factored=True)[first:]
        factored = compare(logits_of(executor, kept), absorbed.contextual)
    floor = max((compare(*pair) for pair in recomputed(executor, request, absorbed.contextual)), key=lambda c: c.linf)
    return Reference(compare(without, absorbed.contextual), factored, floor, without)


def recomputed(executor: Executor, request: Request, contextual: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Other contextual runs that are equal on paper, beside the logits to compare them with, `[tokens, vocabulary]`.

    Behind a key-value cache, twice: the query in one piece behind a cache of the context, and the last token
    alone behind a cache of all before it, as in decoding. Where tokens see later ones, a cache of earlier
    tokens is another computation; there the same rows run in the opposite order, each at its position.
    """
    if sees_later(executor):
        ids = np.concatenate([request.context, request.query])
        stream = run_stream(executor, ids[::-1], np.arange(len(ids))[::-1])[: len(contextual)]
        return [(logits_of(executor, stream)[::-1], contextual)]
    before = np.concatenate([request.context, request.query[:-1]])
    pairs = []
    for past, ids, wanted in (
        (request.context, request.query, contextual),
        (before, request.query[-1:], contextual[-1:]),
    ):
        cache = fill_cache(executor, past, np.arange(len(past)))
        stream = run_stream(executor, ids, np.arange(len(past), len(past) + len(ids)), cache=cache)
        pairs.append((logits_of(executor, stream[-len(wanted) :]), wanted))
    return pairs
