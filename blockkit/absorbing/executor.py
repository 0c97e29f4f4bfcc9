"""Running a whole model layer by layer: the abstract executor over which Algorithm 1 is written.

A backend supplies an `Arrays` value and the parameters as its own arrays; nothing else differs.
`reference` is the NumPy executor, oracle of every test and the default where nothing is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..checkpoint.model import Model, slots, stored_name
from ..design.architecture import Architecture, Block, Head
from ..errors import BadInput
from ..graph.arrays import Array, Arrays, NarrowArrays, numpy_arrays, wide_dtype
from ..graph.changes import Change, MatrixChange, Overlay, change_of, merged
from ..graph.evaluate import evaluate
from ..graph.graph import Graph, Node
from ..graph.ops.mixing import MixingOp
from ..graph.packing import Packing, Past

Overlays = Mapping[int, Overlay]  # by layer


class Rows(NamedTuple):
    """A node's value at some rows only: cut inside the compiled program, so that nothing else leaves it."""

    name: str
    start: int
    stop: int


@dataclass
class Executor:
    """A model that can be run block by block.

    Attributes:
        architecture: what is run.
        arrays: the backend's primitives.
        parameters: every slot's values, as the backend's arrays; read anew in every run.
        dtype: in which weights and activations are held.
        written: a changed parameter as the model's file will hold it, where that is stored in 16 bits; None for a model
            that is stored as widely as it runs.
    """

    architecture: Architecture
    arrays: Arrays
    parameters: Mapping[str, Array]
    dtype: str
    written: Callable[[str, Change], np.ndarray] | None = None
    _compiled: dict[Any, Any] = field(default_factory=dict, repr=False)
    _names: dict[int, dict[str, str]] = field(default_factory=dict, repr=False)

    @property
    def _narrow(self) -> str | None:
        """The dtype to round every value to: NumPy widens 16 bits that meet an ordinary number."""
        return self.dtype if isinstance(self.arrays, NarrowArrays) else None

    @property
    def depth(self) -> int:
        return self.architecture.depth or 0

    def graph(self, layer: int) -> Graph:
        return self.architecture.graphs[self.architecture.kind_at(layer)]

    def stored(self, layer: int, parameter: str) -> np.ndarray:
        """A parameter's values as float64."""
        return self.host(self.parameters[stored_name(self.architecture, layer, parameter)])

    def host(self, value: Array) -> np.ndarray:
        """Any array as float64 NumPy."""
        return np.asarray(self.arrays.to_numpy(self.arrays.cast(value, wide_dtype(self.dtype))), np.float64)

    def embed(self, ids: np.ndarray, positions: np.ndarray) -> Array:
        """Token ids `[tokens]` at `positions [tokens]` -> residual stream `[tokens, d_model]`.

        Raises:
            BadInput: an id outside the vocabulary or a position outside the model's window.
        """
        spec = self.architecture.embedding
        table = self.parameters["embedding"]
        for what, values, limit in (("token id", ids, int(table.shape[0])), ("position", positions, self.window)):
            if len(values) and not 0 <= values.min() <= values.max() < limit:
                raise BadInput(f"a {what} is {int(values.max())}; it must be from 0 to {limit - 1}")
        xp = self.arrays
        stream = xp.take_rows(table, xp.asarray(ids, "int32"))
        scale = self.architecture.number(spec.scale) if spec else None
        if scale is not None:
            stream = stream * xp.cast(xp.asarray(scale, wide_dtype(self.dtype)), self.dtype)
        if "positions" in self.parameters:
            stream = stream + xp.take_rows(self.parameters["positions"], xp.asarray(positions, "int32"))
        if self.architecture.stem is None:
            return stream
        if "stem" not in self._compiled:
            self._compiled["stem"] = self.arrays.jit(self._tokenwise("stem", self.architecture.stem))
        return self._compiled["stem"](self._of("stem"), stream)

    @property
    def window(self) -> int:
        """The longest sequence: positions run from 0 to window - 1."""
        length = self.architecture.context_length
        known = self.architecture.size(length).known if length is not None else None
        return known if known is not None else 1 << 31

    def block(
        self,
        layer: int,
        known: Mapping[str, Any],
        wants: Iterable[str | Rows],
        packing: Packing,
        overlay: Overlay | None = None,
        edited: Mapping[str, Array] | None = None,
    ) -> dict[Any, Array]:
        """Values of a block's nodes, by what was asked for; see `blockkit.graph.evaluate.evaluate`.

        `edited` parameters take the place of the model's own; an `overlay` is kept beside them as factors.
        Compiled once per kind of block and request.
        """
        kind, wants = self.architecture.kind_at(layer), tuple(wants)
        changes = overlay or {}
        flags = tuple((n, type(c).__name__, c.per_token) for n, c in sorted(changes.items()))
        key = (kind, wants, tuple(sorted(known)), packing.segments, flags, tuple(sorted(packing.past)))
        if key not in self._compiled:
            self._compiled[key] = self.arrays.jit(self._program(kind, wants, packing.segments, flags))
        if layer not in self._names:
            parameters = self.graph(layer).parameters
            self._names[layer] = {p.name: stored_name(self.architecture, layer, p.name) for p in parameters}
        past = {n: (p.args, p.positions) for n, p in packing.past.items()}
        factors = {n: self._factors(c) for n, c in changes.items()}
        given = edited or {}
        stored = {n: given[n] if n in given else self.parameters[s] for n, s in self._names[layer].items()}
        found = self._compiled[key](stored, dict(known), packing.positions, factors, past, packing.memory)
        return dict(zip(wants, found, strict=True))

    def _program(
        self, kind: str, wants: tuple[str | Rows, ...], segments: tuple[int, ...], flags: tuple[Any, ...]
    ) -> Any:
        graph, xp = self.architecture.graphs[kind], self.arrays
        names = tuple(dict.fromkeys(w if isinstance(w, str) else w.name for w in wants))

        def program(stored: Any, known: Any, positions: Any, factors: Any, past: Any, memory: Any) -> list[Array]:
            """What is compiled: arrays and dictionaries of arrays in, the values in `wants` out."""
            before = {n: Past(tuple(args), at) for n, (args, at) in past.items()}
            packing = Packing(positions, segments, before, tuple(memory))
            overlay = {name: change_of(factors[name], per_token) for name, _, per_token in flags}

            def mixer(node: Node, args: list[Any], at: Packing) -> Array:
                if isinstance(node.op, MixingOp):
                    return node.op.mix(xp, args, at, at.past.get(node.name))
                return node.op.forward(xp, args, at)

            joined = {n: v if not isinstance(v, tuple) else xp.concatenate(v, axis=0) for n, v in known.items()}
            found = evaluate(graph, xp, stored, joined, names, packing, overlay, mixer, self._narrow)
            return [found[w] if isinstance(w, str) else found[w.name][w.start : w.stop] for w in wants]

        return program

    def merged(self, layer: int, overlay: Overlay) -> dict[str, Array]:
        """The changed parameters of a layer, rounded as an edited checkpoint holds them.

        Raises:
            ExactnessLost: the checkpoint's type is too small for a value.
        """
        found = {}
        for name, change in overlay.items():
            if self.written is not None:  # on the host: a compiler may leave out that a number is rounded on its way
                value = self.written(stored_name(self.architecture, layer, name), change)
                found[name] = self.arrays.asarray(value, self.dtype)
                continue
            if (key := ("merged", type(change).__name__)) not in self._compiled:
                self._compiled[key] = self.arrays.jit(self._merging)
            weight = self.parameters[stored_name(self.architecture, layer, name)]
            found[name] = self._compiled[key](weight, self._factors(change))
        return found

    def _merging(self, weight: Array, factors: tuple[Array, ...]) -> Array:
        return merged(self.arrays, weight, change_of(factors, False))

    def _factors(self, change: Change) -> tuple[Array, ...]:
        parts = (change.left, change.right) if isinstance(change, MatrixChange) else (change.delta,)
        wide = wide_dtype(self.dtype)
        return tuple(self.arrays.asarray(p, wide) for p in parts)

    def logits(self, stream: Array) -> Array:
        """Residual stream `[tokens, d_model]` -> logits `[tokens, vocabulary]`."""
        if "logits" not in self._compiled:
            self._compiled["logits"] = self.arrays.jit(self._logits_program())
        table = self.parameters["embedding" if self.architecture.tied else "head"]
        return self._compiled["logits"](self._of("final"), table, self.parameters.get("head_bias"), stream)

    def _of(self, part: str) -> dict[str, Array]:
        """The parameters of the stem or of the final block, by their names there."""
        names = (n for n in self.parameters if n.startswith(f"{part}."))
        return {n.removeprefix(f"{part}."): self.parameters[n] for n in names}

    def _tokenwise(self, part: str, block: Block) -> Any:
        """A program for what stands before or after the blocks and looks at one token at a time."""
        graph, xp = self.architecture.graph_of(block), self.arrays
        if any(node.op.mixing for node in graph.nodes):
            raise BadInput(f"{self.architecture.name}: {part} may not look at other tokens; make it a block")

        def program(stored: Any, stream: Any) -> Array:
            packing = Packing(None, (int(stream.shape[0]),))
            found = evaluate(graph, xp, stored, {graph.input: stream}, [graph.output], packing, held=self._narrow)
            return found[graph.output]

        return program

    def _logits_program(self) -> Any:
        final, xp = self.architecture.final, self.arrays
        if final is None or self.architecture.head is None:
            raise BadInput(f"{self.architecture.name} has no final norm and head: it is not a whole model")
        last = self._tokenwise("final", final)

        def program(stored: Any, table: Any, bias: Any, stream: Any) -> Array:
            return finished(self.architecture, xp, xp.linear(last(stored, stream), table), bias)

        return program

    def positions(self, values: np.ndarray) -> Array:
        return self.arrays.asarray(values, "int32")


def finished(architecture: Architecture, xp: Arrays, logits: Array, bias: Array | None) -> Array:
    """Logits `[..., vocabulary]` as the head leaves them: shifted by `bias`, scaled, capped."""
    head = architecture.head or Head()
    scale, cap = architecture.number(head.scale), architecture.number(head.softcap)
    logits = logits if bias is None else logits + bias
    logits = logits if scale is None else logits * scale
    return logits if cap is None else cap * xp.tanh(logits / cap)


def reference(model: Model, dtype: str = "float64") -> Executor:
    """The NumPy executor of a model on disk.

    Raises:
        BadInput: a dtype that it does not have.
    """
    arrays = numpy_arrays(dtype)
    names = [name for name, _ in slots(model.architecture)]
    parameters = {n: np.asarray(model.parameter(n), dtype=dtype) for n in names}
    return Executor(model.architecture, arrays, parameters, dtype)


def streamed(model: Model, dtype: str) -> Executor:
    """As `reference`, with every parameter read from disk when it is used and kept no longer.

    Raises:
        BadInput: a dtype that it does not have.
    """
    return Executor(model.architecture, numpy_arrays(dtype), _OnDisk(model, dtype), dtype)


class _OnDisk(Mapping[str, Array]):
    """A model's parameters, read when asked for."""

    def __init__(self, model: Model, dtype: str) -> None:
        self.model, self.dtype = model, dtype

    def __getitem__(self, slot: str) -> np.ndarray:
        if slot not in self.model.parts:
            raise KeyError(slot)
        return np.asarray(self.model.parameter(slot), dtype=self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.model.parts)

    def __len__(self) -> int:
        return len(self.model.parts)
