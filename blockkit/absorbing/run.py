"""An ordinary run of a model, edited or not, with or without a cache of earlier tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..graph.arrays import Array
from ..graph.graph import Graph
from ..graph.ops.mixing import MixingOp
from ..graph.packing import Packing, Past
from .executor import Executor, Overlays

Cache = Mapping[int, Mapping[str, Past]]
Edits = Mapping[int, Mapping[str, Array]]  # merged parameters by layer


def run_stream(
    executor: Executor,
    ids: np.ndarray,
    positions: np.ndarray,
    overlays: Overlays | None = None,
    merge: bool = True,
    cache: Cache | None = None,
    edited: Edits | None = None,
    memory: Array | None = None,
) -> Array:
    """The residual stream `[tokens, d_model]` after the last block, for `ids [tokens]` at `positions`.

    `overlays` are changed parameters by layer, merged into the weights or (`merge=False`) kept beside them
    as factors; `edited` are weights that are merged already. Every token runs through them. With `cache`,
    the tokens also see the earlier ones that it remembers. `memory` is what cross-attention reads, the rows
    `[m, width]` of an encoder's result.
    """
    stream = executor.embed(ids, positions)
    at = executor.positions(positions)
    for layer in range(executor.depth):
        graph = executor.graph(layer)
        read = () if memory is None else (memory,)
        packing = Packing(at, (len(ids),), cache[layer] if cache else {}, read)
        overlay = (overlays or {}).get(layer, {})
        weights = (edited or {}).get(layer) or (executor.merged(layer, overlay) if merge else {})
        kept = {} if merge else overlay
        stream = executor.block(layer, {graph.input: stream}, [graph.output], packing, kept, weights)[graph.output]
    return stream


def fill_cache(executor: Executor, ids: np.ndarray, positions: np.ndarray) -> Cache:
    """What later tokens need of these: for each mixing node its arguments' rows."""
    stream = executor.embed(ids, positions)
    at = executor.positions(positions)
    cache: dict[int, dict[str, Past]] = {}
    for layer in range(executor.depth):
        output = executor.graph(layer).output
        cache[layer], found = remembered(executor, layer, stream, at, (output,))
        stream = found[output]
    return cache


def remembered(
    executor: Executor, layer: int, stream: Array, at: Array, wants: tuple[str, ...] = ()
) -> tuple[dict[str, Past], Mapping[str, Array]]:
    """What a block's mixing nodes remember of the rows `stream [tokens, d_model]`; and the values in `wants`."""
    graph = executor.graph(layer)
    wanted = mixing_arguments(graph)
    names = sorted({*wants, *(a for args in wanted.values() for a in args)})
    values = executor.block(layer, {graph.input: stream}, names, Packing(at, (int(stream.shape[0]),)))
    return {n: Past(tuple(values[a] for a in args), at) for n, args in wanted.items()}, values


def sees_later(executor: Executor) -> bool:
    """Whether tokens also see those after them, so that what a cache remembers is not what they saw."""
    nodes = (n for graph in executor.architecture.graphs.values() for n in graph.nodes)
    return any(isinstance(n.op, MixingOp) and n.op.sees_later for n in nodes)


def mixing_arguments(graph: Graph) -> dict[str, tuple[str, ...]]:
    """The signals (not the parameters) that each mixing node reads."""
    return {n.name: tuple(a for a in n.args if a not in graph.parameter) for n in graph.nodes if n.op.mixing}


def logits_of(executor: Executor, stream: Array) -> np.ndarray:
    """Logits `[tokens, vocabulary]` on the host, in at least float32."""
    value = executor.logits(stream)
    wide = "float64" if executor.dtype == "float64" else "float32"
    return np.asarray(executor.arrays.to_numpy(executor.arrays.cast(value, wide)))
