"""A trial on a real sequence: every mixing node computes its own forward, over a context and without it.

The complement of `blockkit.trials.trial`, which stands in for mixing nodes. The contextual run is the block on the
context's rows and the query's; the reduced run is the block on the query's rows alone, each at its own position.
Where cross-attention reads another sequence, that one loses its first rows as well. Plans are solved by
`blockkit.trials.trial.solve`. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import BadInput
from ..graph.arrays import NumpyArrays
from ..graph.evaluate import evaluate
from ..graph.graph import Graph
from ..graph.mixers.cross_attention import CrossAttend
from ..graph.packing import Packing
from .trial import Values, numbers_of, random_parameters


@dataclass(frozen=True)
class SequenceTrial:
    """A block with numbers, and a sequence whose first rows are the context; see `blockkit.trials.trial.Runs`.

    Attributes:
        parameters: float64 arrays `[d_out, d_in]` or `[width]` by name.
        stream: the residual stream of context and query, `[context + query, width]`.
        context: how many rows are context.
        tokens: how many of the query's tokens, the last ones, are served.
        memory: what cross-attention reads, `[context + kept, memory_width]`; None where there is none.
    """

    graph: Graph
    parameters: Mapping[str, np.ndarray]
    stream: np.ndarray
    context: int
    tokens: int
    memory: np.ndarray | None = None

    def rows(
        self, contextual: bool, wants: tuple[str, ...], parameters: Mapping[str, np.ndarray], served: slice
    ) -> Values:
        """The whole sequence goes through the block; the rows of some served tokens are given."""
        first = 0 if contextual else self.context
        positions = np.arange(first, len(self.stream))
        known = {self.graph.input: self.stream[first:]}
        memory = () if self.memory is None else (self.memory[first:],)
        packing = Packing(positions, (len(positions),), memory=memory)
        values = evaluate(self.graph, NumpyArrays(), parameters, known, wants, packing)
        return {name: value[-self.tokens :][served] for name, value in values.items()}


def draw_sequence(
    graph: Graph, seed: int = 0, context: int = 5, query: int = 3, tokens: int | None = None
) -> SequenceTrial:
    """Random weights and a random sequence, of which the last `tokens` query tokens are served (by default all).

    Raises:
        BadInput: a size of the graph is still a symbol, or the counts do not fit.
    """
    served = query if tokens is None else tokens
    if context < 0 or not 1 <= served <= query:
        raise BadInput(f"a sequence of {context} + {query} tokens cannot serve {served}: give 1 to {query}")
    widths, rng = numbers_of(graph), np.random.default_rng(seed)
    parameters = random_parameters(graph, widths, rng)
    stream = rng.normal(size=(context + query, *widths[graph.input]))
    width = _memory_width(graph)
    memory = None if width is None else rng.normal(size=(context + query, width))
    return SequenceTrial(graph, parameters, stream, context, served, memory)


def _memory_width(graph: Graph) -> int | None:
    """The width of the other sequence; None if nothing reads one."""
    widths = {n.op.memory_width for n in graph.nodes if isinstance(n.op, CrossAttend)}
    if len(widths) > 1 or any(w.known is None for w in widths):
        shown = ", ".join(map(str, widths))
        raise BadInput(f"a trial reads one other sequence, of a width that is a number; cross-attention wants {shown}")
    return next((w.known for w in widths), None)
