"""An architecture as a real `keras.Model`: summarised, saved, loaded and trained like any other."""

from __future__ import annotations

from typing import Any

import keras
from blockkit.architecture import Architecture
from blockkit.checkpoint import Model, slots, stored_name
from blockkit.errors import BadInput
from blockkit.evaluate import evaluate
from blockkit.graph import Graph
from blockkit.layout import Layout
from blockkit.spec import architecture_from, parse_document, to_document
from keras import ops

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
            if slot in ("embedding", "positions", "head"):
                self.own(slot, shape, slot, "random_normal")

    def call(self, ids: Any, positions: Any) -> Any:
        stream = ops.take(self.slots["embedding"], ids, axis=0)
        if self.factor is not None:
            stream = stream * ops.cast(self.factor, stream.dtype)
        if "positions" in self.slots:
            stream = stream + ops.take(self.slots["positions"], positions, axis=0)
        return stream


class GraphBlock(Weights):
    """A block's graph on packed sequences: `x [rows, d_model]`, `positions [rows]`, `segments` rows each."""

    def __init__(self, graph: Graph, names: dict[str, str], shared: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.graph, self.names = graph, names
        self.shared = lambda slot: shared[slot]  # owned by an earlier block; Keras must not count it twice
        offset = {n.args[1] for n in graph.nodes if getattr(n.op, "offset", 0.0)}
        for p in graph.parameters:
            if names[p.name] in shared:
                continue
            shape = tuple(int(s.known or 0) for s in p.shape)
            vector = "zeros" if p.name in offset or p.name.endswith("bias") else "ones"
            self.own(names[p.name], shape, p.name, "glorot_uniform" if len(shape) == 2 else vector)
        self.built = True

    def call(self, x: Any, positions: Any, segments: tuple[int, ...]) -> Any:
        stored = {
            p: ops.convert_to_tensor(self.slots[slot] if slot in self.slots else self.shared(slot))
            for p, slot in self.names.items()
        }
        layout = Layout(positions, segments)
        return evaluate(self.graph, KerasArrays(), stored, {self.graph.input: x}, [self.graph.output], layout)[
            self.graph.output
        ]

    def compute_output_shape(self, shape: Any, *rest: Any) -> Any:
        return shape


class CausalLM(keras.Model):
    """A whole model: token ids `[batch, tokens]` (and, if given, positions) to logits `[batch, tokens, vocabulary]`.

    Saved files hold the architecture itself, so loading needs nothing else.

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
        final = architecture.graph_of(architecture.final) if architecture.final else None
        if final is None or architecture.head is None:
            raise BadInput(f"{architecture.name} has no final norm and head: it is not a whole model")
        names = {p.name: f"final.{p.name}" for p in final.parameters}
        self.final = GraphBlock(final, names, {}, name="final", dtype=dtype)
        self.cap = architecture.number(architecture.head.softcap)
        self.built = True

    @property
    def slots(self) -> dict[str, Any]:
        """Every variable by slot."""
        return {s: v for part in (self.embedding, *self.blocks, self.final) for s, v in part.slots.items()}

    def call(self, ids: Any, positions: Any = None) -> Any:
        batch, tokens = ids.shape
        if batch is None or tokens is None:
            raise BadInput(
                "the model needs batches of a known size: use train_on_batch, or a dataset with fixed shapes "
                "(`tf.data.Dataset.batch(n, drop_remainder=True)`)"
            )
        rows = (batch * tokens,)
        if positions is None:
            positions = ops.tile(ops.arange(tokens, dtype="int32"), [batch])
        positions = ops.reshape(positions, rows)
        stream = self.embedding(ops.reshape(ids, rows), positions)
        for block in (*self.blocks, self.final):
            stream = block(stream, positions, (tokens,) * batch)
        table = self.embedding.slots["embedding" if self.architecture.tied else "head"]
        logits = KerasArrays().linear(stream, ops.convert_to_tensor(table))
        logits = logits if self.cap is None else self.cap * ops.tanh(logits / self.cap)
        return ops.reshape(logits, (batch, tokens, -1))

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
