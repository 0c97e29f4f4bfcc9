"""An operation of one's own: its forward, its parameters and its declared laws; judged, patched and tried.

python examples/custom_component.py
blockkit check examples/composite.yaml --components examples/custom_component.py
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import blockkit as bk


@dataclass(frozen=True)
class Sinh(bk.Operation):
    """y = gain * sinh(u / temperature), a heavy-tailed activation that the kit does not have."""

    input: bk.Signal
    temperature: float = 1.0
    kind = "sinh"
    parameters = ("gain",)
    injective = True

    def compute(self, xp, u, gain):
        """`xp` has the array functions that every backend knows."""
        return gain * (xp.exp(u / self.temperature) - xp.exp(-u / self.temperature)) / 2

    @bk.solves("u", "u' = temperature asinh(t / gain)", nonzero=["gain"])
    def for_u(self, t, u, gain):
        return self.temperature * np.arcsinh(t / gain)

    @bk.solves("gain", "gain' = t / sinh(u / temperature)", nonzero=["u"])
    def for_gain(self, t, u, gain):
        return t / np.sinh(u / self.temperature)


@dataclass(frozen=True)
class FalseSinh(Sinh):
    """The same with a law that is wrong: it forgets the temperature."""

    kind = "false_sinh"

    @bk.solves("u", "u' = asinh(t / gain)", nonzero=["gain"])
    def for_u(self, t, u, gain):
        return np.arcsinh(t / gain)


def block(component: type[Sinh]) -> bk.Block:
    x = bk.stream()
    v = x + bk.Attention(bk.RMSNorm(x), heads=2, head_dim=6, name="attention")
    inside = bk.Linear(bk.RMSNorm(v), out=20, name="up")
    return bk.Block(v + bk.Linear(component(inside, temperature=2.0, name="act"), name="down"), width=8)


if __name__ == "__main__":
    print(bk.check(block(Sinh)))
    for only in ("act.gain", "up.weight"):  # solved by the declared laws, through `down`
        tried = bk.verify(block(Sinh), only=[only])
        print(f"\nonly {only}: {tried}")
    print("\nThe false law is refused:")
    try:
        bk.check(block(FalseSinh))
    except bk.BadInput as error:
        print(error)
    print("\nIn a spec, inside a composite:")
    print(bk.check(Path(__file__).with_name("composite.yaml"), components=[Sinh]))
