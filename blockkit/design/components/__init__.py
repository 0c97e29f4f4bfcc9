"""The parts of which people build blocks, and how each lowers to primitive operations.

    x = stream()
    v = x + RMSNorm(Attention(RMSNorm(x), heads=4, kv_heads=1, head_dim=256))
    y = v + RMSNorm(GatedMLP(RMSNorm(v), hidden=2048, activation="gelu_tanh"))
    block = Block(y, width=640)

A component is a frozen dataclass: its first field is its input, the others are its settings. Sizes
are numbers or symbols (`hidden="d_ff"`). Parameters are named after the component that owns them:
`mlp.down_proj`. A new component is a subclass with a `lower` method.
"""

from collections.abc import Mapping

from .attention import Attention
from .base import Add, Component, Lowering, Number, Product, Signal, Stream, inputs_of, stream, with_inputs
from .basic import Activation, Bias, Concat, Gain, LayerNorm, Linear, RMSNorm, Scale, Slice, Softcap, Softmax
from .cross_attention import CrossAttention
from .experts import Experts
from .head_settings import QKNorm, RelativeBiasSettings, RopeSettings
from .latent import LatentAttention
from .lowering import lower
from .mixers import LongConvolution, Mixer, Pooling, TokenMixing
from .mlp import MLP, GatedMLP
from .own import Operation
from .recurrent import ChannelMix, Retention, TimeMix
from .state_space import Mamba, Mamba2

COMPONENTS: Mapping[str, type[Component]] = {
    c.kind: c
    for c in (
        Add, Product, Scale, RMSNorm, LayerNorm, Linear, Activation, Softcap, Softmax, Gain, Bias, Concat, Slice,
        MLP, GatedMLP, Experts, Attention, LatentAttention, CrossAttention, Mixer, Mamba, Mamba2,
        TimeMix, ChannelMix, Retention, LongConvolution, TokenMixing, Pooling,
    )
}  # fmt: skip

__all__ = [
    "COMPONENTS", "MLP", "Activation", "Add", "Attention", "Bias", "ChannelMix", "Component", "Concat",
    "CrossAttention",
    "Experts", "Gain", "GatedMLP", "LatentAttention", "LayerNorm", "Linear", "LongConvolution", "Lowering", "Mamba",
    "Mamba2", "Mixer", "Number", "Operation", "Pooling", "Product", "QKNorm", "RMSNorm", "RelativeBiasSettings",
    "Retention", "RopeSettings", "Scale", "Signal", "Slice", "Softcap", "Softmax", "Stream", "TimeMix",
    "TokenMixing", "inputs_of", "lower", "stream", "with_inputs",
]  # fmt: skip
