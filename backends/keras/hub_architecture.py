"""A KerasHub causal language model as an architecture: read off its layers, by the part that each plays in a block.

Nothing is looked up by a model's name. What a layer holds is read (kernels and the equations they are used in,
epsilons, rotary settings); what stands only in its code is measured by calling it (the offset of a norm's scale, the
factor of the embedding, whether a sliding window is kept). Every variable must have found its place, and `hub.py`
proves the description, block by block, against the model's own run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops

from blockkit.checkpoint.model import slots
from blockkit.design.architecture import Architecture, Block, Embedding, Head, Layers
from blockkit.design.components import (
    Attention,
    Component,
    Experts,
    GatedMLP,
    Lowering,
    QKNorm,
    RMSNorm,
    RopeSettings,
    stream,
)
from blockkit.errors import BadInput
from blockkit.graph.sizes import Size

from .hub_storage import Stored, host, without_gradients

ROLES = {  # the names that KerasHub's blocks have for each part
    "attention_norm": ("pre_attention_norm", "_self_attention_layernorm"),
    "attention": ("attention", "_self_attention_layer"),
    "attention_out_norm": ("post_attention_norm",),
    "mlp_norm": ("pre_ffw_norm", "_feedforward_layernorm"),
    "experts": ("_sparse_moe_block",),
    "gate_proj": ("gating_ffw", "_feedforward_gate_dense"),
    "up_proj": ("gating_ffw_2", "_feedforward_intermediate_dense"),
    "down_proj": ("ffw_linear", "_feedforward_output_dense"),
    "mlp_out_norm": ("post_ffw_norm",),
    "q_proj": ("query_dense", "_query_dense"),
    "k_proj": ("key_dense", "_key_dense"),
    "v_proj": ("value_dense", "_value_dense"),
    "o_proj": ("output_dense", "_output_dense"),
    "q_norm": ("query_norm", "_query_dense_layer_norm"),
    "k_norm": ("key_norm", "_key_dense_layer_norm"),
    "rope": ("rope_layer", "rotary_embedding_layer"),
    "window": ("sliding_window", "_sliding_window", "sliding_window_size"),
}
EXPERTS = {  # a bank's stacked kernels, and how they and the routing weights make up the result
    "gate_proj": ("_expert_feedforward_gate_dense", "th,ehm->tem"),
    "up_proj": ("_expert_feedforward_intermediate_dense", "th,ehm->tem"),
    "down_proj": ("_expert_feedforward_output_dense", "tem,emh->th"),
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "tanh": "tanh", "sigmoid": "sigmoid"}


@dataclass(frozen=True)
class Described:
    """A model's architecture, and for each of its slots the variable that holds it."""

    architecture: Architecture
    stored: Mapping[str, Stored]


def described(model: Any, tokens: int) -> Described:
    """What a KerasHub causal language model is, for sequences of up to `tokens` tokens.

    Raises:
        BadInput: the model has a part that is not known here, or one that is quantised; the message names it.
    """
    backbone = _backbone(model)
    stored: dict[str, Stored] = {}
    blocks: list[Block] = []
    kinds: list[str] = []
    for i, layer in enumerate(backbone.transformer_layers):
        reader = BlockReader(layer, tokens)
        block = reader.block()
        found = next((k for k, known in enumerate(blocks) if known == block), len(blocks))
        blocks += [block] if found == len(blocks) else []
        kinds.append(f"block_{found}")
        stored.update({f"layers.{i}.{name}": s for name, s in reader.stored.items()})
    final = BlockReader(backbone.layer_norm, tokens)
    last = Block(final.norm(stream(), backbone.layer_norm, "norm"))
    stored.update({f"final.{name}": s for name, s in final.stored.items()})
    table = backbone.token_embedding
    stored["embedding"] = Stored(table.embeddings, (0,), (1,))
    if not table.tie_weights:
        stored["head"] = Stored.matrix(table.reverse_embeddings)
    vocabulary, width = (int(n) for n in table.embeddings.shape)
    architecture = Architecture(
        type(backbone).__name__,
        width,
        {f"block_{i}": block for i, block in enumerate(blocks)},
        Layers(tuple(kinds), len(kinds)),
        Embedding(vocabulary, _embedding_scale(model)),
        last,
        Head(tied=bool(table.tie_weights), softcap=table.logit_soft_cap),
    )
    _insist_on_all(model, architecture, stored)
    return Described(architecture, stored)


def _backbone(model: Any) -> Any:
    backbone: Any = getattr(model, "backbone", None)
    if not all(hasattr(backbone, part) for part in ("token_embedding", "transformer_layers", "layer_norm")):
        raise BadInput(
            f"{type(model).__name__} is no KerasHub causal language model with decoder blocks (a backbone that has "
            "token_embedding, transformer_layers and layer_norm); other Keras models are described by a spec"
        )
    inputs = set(backbone.input) if isinstance(backbone.input, dict) else set()
    if inputs != {"token_ids", "padding_mask"}:
        raise BadInput(
            f"{model.name} reads {', '.join(sorted(inputs)) or 'other inputs'}; only text models "
            "(token_ids and padding_mask) can be patched: build the backbone without its vision encoder"
        )
    for layer in model._flatten_layers():
        if getattr(layer, "quantization_mode", None):
            raise BadInput(f"{layer.path} is quantised ({layer.quantization_mode}); load the model unquantised")
        if getattr(layer, "lora_enabled", False):
            raise BadInput(f"{layer.path} has LoRA factors beside its weights; merge them first")
    return backbone


def _insist_on_all(model: Any, architecture: Architecture, stored: Mapping[str, Stored]) -> None:
    """Every slot has a variable of its shape, and every variable a slot."""
    for slot, shape in slots(architecture):
        if slot not in stored or stored[slot].shape != shape:
            there = f"of the shape {stored[slot].shape}" if slot in stored else "not there"
            raise BadInput(f"{model.name}: {slot} must have the shape {shape}, but is {there}")
    known = {id(s.variable) for s in stored.values()}
    if unknown := [v.path for v in model.backbone.weights if id(v) not in known]:
        raise BadInput(f"{model.name}: what {', '.join(unknown[:4])} is for is not known here; describe it by a spec")


def part(layer: Any, role: str) -> Any:
    """What plays a part in a layer; None if nothing does."""
    return next((found for name in ROLES[role] if (found := getattr(layer, name, None)) is not None), None)


def required(layer: Any, role: str) -> Any:
    """What plays a part in a layer.

    Raises:
        BadInput: nothing does.
    """
    found = part(layer, role)
    if found is None:
        raise BadInput(
            f"{layer.path}: a {type(layer).__name__} has none of {', '.join(ROLES[role])}, so it is no block that is "
            "known here; describe the model by a spec"
        )
    return found


@dataclass
class BlockReader:
    """Reads one decoder block: its components, and beside each parameter's name the variable that holds it."""

    layer: Any
    tokens: int
    stored: dict[str, Stored] = field(default_factory=dict)

    def block(self) -> Block:
        """Attention and a feed-forward part, each behind a norm and added to the stream."""
        layer, x = self.layer, stream()
        attended = self.attention(self.norm(x, required(layer, "attention_norm"), "attention_norm"))
        between = x + self._out_norm(attended, "attention_out_norm")
        normed = self.norm(between, required(layer, "mlp_norm"), "mlp_norm")
        experts = part(layer, "experts")
        inner = self.mlp(normed) if experts is None else self.experts(normed, experts)
        return Block(between + self._out_norm(inner, "mlp_out_norm"))

    def norm(self, x: Component, layer: Any, name: str) -> Component:
        self.stored[f"{name}.scale"] = Stored.vector(layer.scale)
        return RMSNorm(x, layer.epsilon, offset=norm_offset(layer), name=name)

    def _out_norm(self, x: Component, role: str) -> Component:
        layer = part(self.layer, role)
        return x if layer is None else self.norm(x, layer, role)

    def _linear(self, layer: Any, name: str) -> Stored:
        """A kernel, with its bias if it has one."""
        self.stored[name] = found = Stored.matrix(layer.kernel, getattr(layer, "equation", "i,io->o"))
        if layer.bias is not None:
            self.stored[f"{name}_bias"] = Stored.vector(layer.bias)
        return found

    def attention(self, x: Component) -> Component:
        layer = required(self.layer, "attention")
        if getattr(layer, "use_bidirectional_attention", False):
            raise BadInput(f"{layer.path}: tokens see later ones; only causal models can be patched here")
        dense = {p: required(layer, p) for p in ("q_proj", "k_proj", "v_proj", "o_proj")}
        kernels = {p: self._linear(d, f"attention.{p}") for p, d in dense.items()}
        heads, head_dim = kernels["q_proj"].sizes[:2]
        scale = getattr(layer, "_inv_norm_factor", None)
        if scale is None and not layer.query_head_dim_normalize:
            scale = (layer.hidden_dim // heads) ** -0.5
        return Attention(
            x,
            heads,
            kernels["k_proj"].sizes[0],
            head_dim,
            rope=rope_settings(required(layer, "rope"), head_dim),
            qk_norm=self._head_norm(layer),
            window=self._window(layer),
            softcap=getattr(layer, "logit_soft_cap", None),
            scale=scale,
            bias=tuple(k for k in ("q", "k", "v") if dense[f"{k}_proj"].bias is not None),
            out_bias=dense["o_proj"].bias is not None,
            name="attention",
        )

    def _head_norm(self, attention: Any) -> QKNorm | None:
        norms = {p: part(attention, p) for p in ("q_norm", "k_norm")}
        if norms["q_norm"] is None:
            return None
        for name, layer in norms.items():
            self.stored[f"attention.{name}"] = Stored.vector(layer.scale)
        return QKNorm(norms["q_norm"].epsilon, norm_offset(norms["q_norm"]))

    def _window(self, attention: Any) -> int | None:
        """The sliding window, where sequences are long enough to feel it.

        Where a backend has a fused attention, some of KerasHub's blocks leave their window out; so they are asked.
        """
        if not getattr(attention, "use_sliding_window_attention", True):
            return None
        window = part(attention, "window") or part(self.layer, "window")
        if not window or window >= self.tokens:
            return None
        width = self.stored["attention_norm.scale"].shape[0]
        first, second = np.random.default_rng(0).standard_normal((2, 1, window + 1, width)).astype("float32")
        second[:, 1:] = first[:, 1:]
        one, other = (called(self.layer, x)[:, -1] for x in (first, second))
        return int(window) if np.abs(one - other).max() <= 1e-6 * np.abs(one).max() else None

    def mlp(self, x: Component) -> Component:
        for role in ("gate_proj", "up_proj", "down_proj"):
            kernel = self._linear(required(self.layer, role), f"mlp.{role}")
        if any(name.endswith("_bias") for name in self.stored if name.startswith("mlp.")):
            raise BadInput(f"{self.layer.path}: biases in the feed-forward part are not known here; write a spec")
        return GatedMLP(x, kernel.shape[1], _activation(self.layer), name="mlp")

    def experts(self, x: Component, layer: Any) -> Component:
        bank, router = getattr(layer, "expert_bank", None), getattr(layer, "_sparse_feedforward_gate_dense", None)
        if bank is None or router is None:
            raise BadInput(f"{layer.path}: a {type(layer).__name__} is no mixture of experts that is known here")
        self._linear(router, "mlp.router")
        for name, (attribute, equation) in EXPERTS.items():
            self.stored[f"mlp.{name}"] = Stored.matrix(getattr(bank, attribute), equation)
        count, _, hidden = (int(n) for n in getattr(bank, EXPERTS["gate_proj"][0]).shape)
        return Experts(x, count, int(layer.top_k), hidden, _activation(bank), name="mlp")


def _activation(layer: Any) -> str:
    """The name of a layer's activation; blocks that hold none (Gemma's) have the tanh GELU in their code."""
    function = getattr(layer, "activation", None)
    if function is None:
        return "gelu_tanh"
    name = getattr(function, "__name__", str(function))
    if name not in ACTIVATIONS:
        raise BadInput(f"{layer.path}: the activation {name} is not known here; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def called(layer: Any, x: np.ndarray) -> np.ndarray:
    """What a layer makes of `x`, on the host in float32."""
    with without_gradients():
        value = layer(ops.cast(ops.convert_to_tensor(x), layer.compute_dtype), training=False)
        return np.asarray(ops.convert_to_numpy(ops.cast(value, "float32")))


def norm_offset(layer: Any) -> float:
    """What a norm adds to its scale, 0 or 1: measured on ones, of which the norm is 1 / sqrt(1 + eps).

    Raises:
        BadInput: the layer is no root-mean-square norm.
    """
    scale = host(layer.scale).astype(np.float64)
    normed = called(layer, np.ones((1, 1, scale.shape[-1]), "float32"))[0, 0]
    found = normed.astype(np.float64) * np.sqrt(1 + layer.epsilon)
    apart = {offset: float(np.abs(found - offset - scale).max()) for offset in (0.0, 1.0)}
    offset = min(apart, key=apart.__getitem__)
    if not apart[offset] <= 0.02 * max(1.0, float(np.abs(scale).max())):
        raise BadInput(f"{layer.path}: a {type(layer).__name__} is no RMS norm with a scale")
    return offset


def rope_settings(layer: Any, head_dim: int) -> RopeSettings:
    """The rotary settings whose frequencies are the layer's own.

    Raises:
        BadInput: none are.
    """
    wanted = np.asarray(ops.convert_to_numpy(layer._get_inverse_freq(head_dim)), np.float64)
    base, factor = float(layer.max_wavelength), getattr(layer, "frequency_adjustment_factor", None)
    candidates = [RopeSettings(base), RopeSettings(base, scaling=float(layer.scaling_factor))]
    if factor is not None:
        candidates.append(
            RopeSettings(
                base,
                kind="llama3",
                factor=float(factor),
                original_length=layer.pretraining_sequence_length,
                low_freq_factor=float(layer.low_freq_factor),
                high_freq_factor=float(layer.high_freq_factor),
            )
        )
    for found in candidates:
        op = found.op(Lowering({}, Size.of(head_dim), {}), layer.name, Size.of(head_dim))
        if np.allclose(op.frequencies(head_dim, "float64"), wanted, rtol=1e-5, atol=0):
            return found
    raise BadInput(f"{layer.path}: rotary positions of the type {getattr(layer, 'rope_type', '?')} are not known here")


def own_streams(model: Any, ids: np.ndarray) -> list[np.ndarray]:
    """The model's own residual stream for ids `[tokens]`, float32 `[tokens, d_model]`: what enters each block, and
    what leaves the last."""
    backbone = model.backbone
    stages = [*backbone.transformer_layers, backbone.layer_norm]
    entering = [s.input[0] if isinstance(s.input, list | tuple) else s.input for s in stages]
    rows = np.asarray(ids, "int32")[None]
    with without_gradients():
        found = keras.Model(backbone.input, entering)({"token_ids": rows, "padding_mask": np.ones_like(rows)})
        return [np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")))[0] for x in found]


def _embedding_scale(model: Any) -> float | None:
    """What the embedding is multiplied by, as the stream shows it that enters the first block."""
    table = model.backbone.token_embedding.embeddings
    ids = np.arange(min(8, int(table.shape[0])))
    seen, rows = own_streams(model, ids)[0].astype(np.float64), host(table).astype(np.float64)[ids]
    scale, root = float((seen * rows).sum() / (rows * rows).sum()), float(rows.shape[1]) ** 0.5
    return next((exact for near, exact in ((1.0, None), (root, root)) if abs(scale / near - 1) < 0.01), scale)
