"""An architecture as a real `keras.Model`: summarised, saved, loaded and trained like any other."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from blockkit.absorbing.executor import finished
from blockkit.checkpoint.model import Model, slots, stored_name
from blockkit.design.architecture import Architecture, Block
from blockkit.design.spec import architecture_from, parse_document, to_document
from blockkit.errors import BadInput
from blockkit.graph.evaluate import evaluate
from blockkit.graph.graph import Graph, Node
from blockkit.graph.packing import Packing

from .arrays import KerasArrays


class Weights(keras.layers.Layer):
    """A layer that owns weights by slot (`layers.3.mlp.down_proj`), in the kit's orientation ([d_out, d_in])."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.slots: dict[str, Any] = {}

    def own(self, slot: str, shape: tuple[int, ...], label: str, fill: str) -> None:
        self.slots[slot] = self.add_weight(shape=shape, initializer=fill, name=label.replace(".", "_"))
        self.built = True


class TokenEmbedding(Weights):
    """Ids and positions `[rows]` to the residual stream `[rows, d_model]`; the same matrix may end the model."""

    def __init__(self, architecture: Architecture, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        spec = architecture.embedding
        self.factor = architecture.number(spec.scale) if spec else None
        for slot, shape in slots(architecture):
            if slot in ("embedding", "positions", "head", "head_bias"):
                self.own(slot, shape, slot, "zeros" if slot == "head_bias" else "random_normal")

    def call(self, ids: Any, positions: Any) -> Any:
        stream = ops.take(self.slots["embedding"], ids, axis=0)
        if self.factor is not None:
            stream = stream * ops.cast(self.factor, stream.dtype)
        if "positions" in self.slots:
            stream = stream + ops.take(self.slots["positions"], positions, axis=0)
        return stream


class GraphBlock(Weights):
    """A block's graph on packed sequences of equal length: `x [rows, d_model]`, `positions [rows]`, `tokens` each."""

    def __init__(self, graph: Graph, names: dict[str, str], shared: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.graph, self.names = graph, names
        self.shared: Any = shared.__getitem__  # owned by an earlier block; Keras must not count it twice
        offset = {n.args[1] for n in graph.nodes if getattr(n.op, "offset", 0.0)}
        for p in graph.parameters:
            if names[p.name] in shared:
                continue
            shape = tuple(int(s.known or 0) for s in p.shape)
            vector = "zeros" if p.name in offset or p.name.endswith("bias") else "ones"
            self.own(names[p.name], shape, p.name, "glorot_uniform" if len(shape) == 2 else vector)
        self.built = True

    def call(self, x: Any, positions: Any, tokens: int) -> Any:
        """The stream after the block, `[rows, d_model]`, of packed sequences of `tokens` rows each."""
        stored = {
            p: ops.convert_to_tensor(self.slots[slot] if slot in self.slots else self.shared(slot))
            for p, slot in self.names.items()
        }
        xp, packing, output = KerasArrays(), Packing(positions, (tokens,)), self.graph.output

        def mixer(node: Node, args: list[Any], packed: Packing) -> Any:
            return self._each_sequence(xp, node, args, packed)

        return evaluate(self.graph, xp, stored, {self.graph.input: x}, [output], packing, mixer=mixer)[output]

    def _each_sequence(self, xp: KerasArrays, node: Node, args: list[Any], packed: Packing) -> Any:
        """A mixing node on every sequence by itself; how many there are may be unknown until the model runs."""
        signals = [i for i, name in enumerate(node.args) if name not in self.graph.parameter]
        tokens = packed.segments[0]

        def one(parts: tuple[Any, ...]) -> Any:
            *rows, positions = parts
            given = {**dict(enumerate(args)), **dict(zip(signals, rows, strict=True))}
            return node.op.forward(xp, list(given.values()), Packing(positions, packed.segments))

        sequences = [ops.reshape(args[i], (-1, tokens, args[i].shape[-1])) for i in signals]
        out = xp.each(one, (*sequences, ops.reshape(packed.positions, (-1, tokens))))
        return ops.reshape(out, (-1, out.shape[-1]))

    def compute_output_shape(self, shape: Any, *rest: Any) -> Any:
        return shape


@keras.saving.register_keras_serializable(package="blockkit")
class CausalLM(keras.Model):
    """A whole model: token ids `[batch, tokens]` (and, if given, positions) to logits `[batch, tokens, vocabulary]`.

    Saved files hold the architecture itself: `keras.saving.load_model` needs only this module to be imported.

    Raises:
        BadInput: the architecture is not a whole model, or a size has no number.
    """

    def __init__(self, architecture: Architecture | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(architecture, dict):
            architecture = architecture_from(architecture, parse_document("{}", "saved model")[1])
        self.architecture, dtype = architecture, self.dtype_policy
        self.embedding = TokenEmbedding(architecture, name="embedding", dtype=dtype)
        shared: dict[str, Any] = {}
        self.blocks = []
        for layer in range(architecture.depth or 0):
            kind = architecture.kind_at(layer)
            graph = architecture.graphs[kind]
            names = {p.name: stored_name(architecture, layer, p.name) for p in graph.parameters}
            block = GraphBlock(graph, names, dict(shared), name=f"{kind}_{layer}", dtype=dtype)
            shared.update({slot: v for slot, v in block.slots.items() if slot.startswith("shared.")})
            self.blocks.append(block)
        if architecture.final is None or architecture.head is None:
            raise BadInput(f"{architecture.name} has no final norm and head: it is not a whole model")
        self.stem = self._tokenwise("stem", architecture.stem) if architecture.stem else None
        self.final = self._tokenwise("final", architecture.final)
        self.built = True

    def _tokenwise(self, part: str, block: Block) -> GraphBlock:
        graph = self.architecture.graph_of(block)
        return GraphBlock(graph, {p.name: f"{part}.{p.name}" for p in graph.parameters}, {}, name=part,
                          dtype=self.dtype_policy)  # fmt: skip

    @property
    def slots(self) -> dict[str, Any]:
        """Every variable by slot."""
        parts = (self.embedding, *([self.stem] if self.stem else []), *self.blocks, self.final)
        return {s: v for part in parts for s, v in part.slots.items()}

    def call(self, ids: Any, positions: Any = None) -> Any:
        """Logits `[batch, tokens, vocabulary]` of ids `[batch, tokens]`."""
        tokens = ids.shape[-1]
        if tokens is None:
            raise BadInput("the model needs sequences of a known length: pad them, and give the dataset a fixed shape")
        if positions is None:
            positions = ops.zeros_like(ids, dtype="int32") + ops.arange(tokens, dtype="int32")
        positions = ops.reshape(positions, (-1,))
        stream = self.embedding(ops.reshape(ids, (-1,)), positions)
        for block in (*([self.stem] if self.stem else []), *self.blocks, self.final):
            stream = block(stream, positions, tokens=tokens)
        xp, stored = KerasArrays(), self.embedding.slots
        table = ops.convert_to_tensor(stored["embedding" if self.architecture.tied else "head"])
        bias = ops.convert_to_tensor(stored["head_bias"]) if "head_bias" in stored else None
        logits = finished(self.architecture, xp, xp.linear(stream, table), bias)
        return ops.reshape(logits, (-1, tokens, logits.shape[-1]))

    def compute_output_shape(self, shape: Any, *rest: Any) -> Any:
        return (*shape, next(iter(self.embedding.slots.values())).shape[0])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "architecture": to_document(self.architecture)}


def build(architecture: Architecture, dtype: str = "float32") -> CausalLM:
    """A Keras model of the architecture, with fresh weights.

    Raises:
        BadInput: the architecture is not a whole model, or a size has no number.
    """
    return CausalLM(architecture, dtype=dtype)


def load_weights(model: CausalLM, source: Model) -> None:
    """Fills every slot from a checkpoint, one tensor at a time.

    Raises:
        BadInput: tensors are missing, unknown or misshapen.
    """
    for slot, variable in model.slots.items():
        variable.assign(source.parameter(slot))
