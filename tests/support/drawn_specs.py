"""Architectures that Hypothesis draws."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

import blockkit as bk
from blockkit.design.architecture import Architecture, Block
from blockkit.design.components import Component, stream

NUMBERS = st.one_of(st.integers(1, 9), st.floats(0.001, 4.0), st.just("eps"))
UNARY: list[Callable[[Any, Any], Component]] = [
    lambda z, n: bk.RMSNorm(z, eps=n, offset=1.0),
    lambda z, n: bk.RMSNorm(z, scale=False),
    lambda z, n: bk.LayerNorm(z, eps=n, bias=False),
    lambda z, n: bk.Linear(z, bias=True),
    lambda z, n: bk.Linear(z, out="d_model"),
    lambda z, n: bk.Activation(z, "silu"),
    lambda z, n: bk.Softcap(z, n),
    lambda z, n: bk.Scale(z, n),
    lambda z, n: bk.Gain(z, offset=0.5),
    lambda z, n: bk.Bias(z),
    lambda z, n: bk.MLP(z, hidden="d_ff", bias=True),
    lambda z, n: bk.GatedMLP(z, hidden=7, activation="relu", name="gated"),
    lambda z, n: bk.Mixer(z),
    lambda z, n: bk.Attention(
        z, heads=3, kv_heads=1, head_dim=4, rope=bk.RopeSettings(base=n), qk_norm=bk.QKNorm(offset=1.0), window=5,
        softcap=n, scale_dim=8, bias=True, out_bias=False, causal=False,
    ),
    lambda z, n: bk.Attention(z, heads="heads", head_dim=2, fused=True),
]  # fmt: skip


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Blocks as people write them in Python, with shared parts."""
    made: list[Any] = [stream()]
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.integers(0, len(UNARY) + 1))
        one, two = (made[draw(st.integers(0, len(made) - 1))] for _ in range(2))
        if kind < len(UNARY):
            built = UNARY[kind](one, draw(NUMBERS))
            built = built if not any(c.name == built.name != "" for c in made) else replace(built, name="")  # type: ignore[type-var]
        else:
            built = one + two if kind == len(UNARY) else one * two
        made.append(built)
    total = bk.Add(tuple(made))
    block = Block(total, "d_model", tied=draw(st.sampled_from([(), ("*",)])) if parameters_of(total) else ())
    constants: dict[str, Any] = draw(st.sampled_from([{}, {"d_model": 6}, {"eps": 1e-5, "d_ff": 9, "heads": 2}]))
    return Architecture(
        "drawn", "d_model", {"main": block}, constants=constants, note="a note: with # signs, and 'quotes'"
    )


def parameters_of(output: Component) -> bool:
    return bool(Block(output, "d_model").graph().parameters)
