"""Random blocks as raw graphs: one generator over a source of choices, for Hypothesis and for plain seeds.

A source of choices is a function `choose(n)` that gives an integer in `0 .. n - 1`; zero is the simplest choice, so
what Hypothesis shrinks towards zero gets simpler.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st

Choose = Callable[[int], int]
Document = dict[str, Any]
T = TypeVar("T")

FUNCTIONS = ("relu", "silu", "gelu_tanh", "tanh", "leaky_relu", "identity", "sigmoid", "gelu")
EPS = (1e-6, 1e-5, 0.0, 0.1)
ALPHAS = (0.5, 2.0, -1.0, -0.7, 1.0, 0.0)


class Draft:
    """A graph that is being drawn."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.width = 3 + choose(4)
        self.widths = {"x": self.width}
        self.parameters: dict[str, list[int]] = {}
        self.nodes: dict[str, dict[str, Any]] = {}

    def chance(self, percent: int) -> bool:
        return self.choose(100) >= 100 - percent

    def pick(self, options: Sequence[T], weights: Sequence[int] | None = None) -> T:
        """One of the options, the first being the simplest; weights are small integers."""
        spread = [o for o, w in zip(options, weights or [1] * len(options), strict=True) for _ in range(w)]
        return spread[self.choose(len(spread))]

    def node(self, op: str, *args: str, width: int | None = None, **settings: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes[name] = {"op": op, "args": list(args), **settings}
        self.widths[name] = self.widths[args[0]] if width is None else width
        return name

    def parameter(self, *shape: int) -> str:
        """A new parameter, or now and then one that is in use already."""
        same = [n for n, s in self.parameters.items() if s == list(shape)]
        if same and self.chance(10):
            return self.pick(same)
        name = f"{'W' if len(shape) == 2 else 'p'}{len(self.parameters)}"
        self.parameters[name] = list(shape)
        return name

    # -- pieces ------------------------------------------------------------------------------------

    def matmul(self, u: str, width: int) -> str:
        return self.node("matmul", u, self.parameter(width, self.widths[u]), width=width)

    def fit(self, u: str, width: int) -> str:
        """`u` brought to a width."""
        if self.widths[u] == width:
            return u
        if self.widths[u] > width and self.chance(15):
            return self.slice(u, width)
        return self.matmul(u, width)

    def slice(self, u: str, width: int) -> str:
        start = self.choose(self.widths[u] - width + 1)
        return self.node("slice", u, width=width, start=start, stop=start + width)

    def gain(self, u: str) -> str:
        offset = {"offset": 1.0} if self.chance(20) else {}
        width = self.widths[u]
        return self.node("multiply", *self._either_order(u, self.parameter(width), offset), width=width, **offset)

    def bias(self, u: str) -> str:
        width = self.widths[u]
        return self.node("add", *self._either_order(u, self.parameter(width), {}), width=width)

    def _either_order(self, u: str, p: str, offset: Mapping[str, float]) -> tuple[str, str]:
        return (p, u) if not offset and self.chance(25) else (u, p)

    def norm(self, u: str) -> str:
        eps = self.pick(EPS, (4, 3, 3, 1)) if self.widths[u] > 1 else EPS[0]  # 0 / 0 has no meaning
        name = self.node(self.pick(("rms_norm", "layer_norm"), (2, 1)), u, eps=eps)
        name = self.gain(name) if self.chance(60) else name
        return self.bias(name) if self.chance(20) else name

    def mix(self, u: str) -> str:
        """A mixing node, with projections before and after it now and then."""
        read = [self.matmul(u, 2 + self.choose(3)) if self.chance(25) else u for _ in range(1 + self.choose(2))]
        width = self.pick((self.width, 2, 4, 7))
        found = self.node("mix", *read, width=width)
        self.nodes[found]["width"] = width
        if width != self.width or self.chance(40):
            return self.matmul(found, self.width) if self.chance(90) else found
        return found

    def step(self, u: str, depth: int) -> str:
        """One operation, or a small composite, on `u`."""
        width = self.widths[u]
        simple: tuple[Callable[[], str], ...] = (
            lambda: self.matmul(u, self.pick((width, self.width, 2 + self.choose(7), 1), (2, 3, 4, 1))),
            lambda: self.bias(u),
            lambda: self.gain(u),
            lambda: self.node("activation", u, fn=self.pick(FUNCTIONS)),
            lambda: self.norm(u),
            lambda: self.node("scale", u, alpha=self.pick(ALPHAS, (4, 4, 4, 4, 2, 1))),
            lambda: self.node("softcap", u, cap=self.pick((2.0, 0.5, 30.0))),
            lambda: self.node("softmax", u),
            lambda: self.slice(u, 1 + self.choose(width)),
        )
        joint: tuple[Callable[[], str], ...] = (
            lambda: self.gate(u, depth),
            lambda: self.sum(u, depth),
            lambda: self.concat(u, depth),
            lambda: self.affine(u),
            lambda: self.experts(u),
            lambda: self.routed(u),
        )
        weights = (8, 4, 4, 5, 3, 2, 1, 1, 1)
        if depth > 0:
            return self.pick((*simple, *joint), (*weights, 4, 3, 2, 2, 1, 1))()
        return self.pick(simple, weights)()

    def chain(self, u: str, depth: int) -> str:
        for _ in range(1 + self.choose(3)):
            u = self.step(u, depth)
        return u

    def _two(self, u: str, depth: int) -> tuple[str, str]:
        left = self.chain(u, depth - 1)
        right = u if self.chance(20) else self.chain(u, depth - 1)
        return left, self.fit(right, self.widths[left])

    def gate(self, u: str, depth: int) -> str:
        left, right = self._two(u, depth)
        return self.node("multiply", left, right)

    def sum(self, u: str, depth: int) -> str:
        left, right = self._two(u, depth)
        return self.node("add", left, right)

    def concat(self, u: str, depth: int) -> str:
        parts = [self.chain(u, depth - 1) for _ in range(2 + self.choose(2))]
        return self.node("concat", *parts, width=sum(self.widths[p] for p in parts))

    def affine(self, u: str) -> str:
        """One vector used as scale and as shift, or twice as a shift."""
        p = self.parameter(self.widths[u])
        first = self.node(self.pick(("multiply", "add"), (2, 1)), u, p)
        return self.node("add", first, p)

    def experts(self, u: str) -> str:
        """A soft mixture: each expert is weighed by its own coordinate of a softmax."""
        count, width = 2, self.widths[u]
        weights = self.node("softmax", self.matmul(u, count))
        terms = []
        for j in range(count):
            expert = self.node("activation", self.matmul(u, width), fn=self.pick(FUNCTIONS))
            expert = self.matmul(expert, width) if self.chance(70) else expert
            share = self.node("slice", weights, width=1, start=j, stop=j + 1)
            terms.append(self.node("multiply", expert, self.spread(share, width)))
        return self.node("add", *terms)

    def routed(self, u: str) -> str:
        """A mixture of experts as real ones are stored: a router chooses, and all experts lie in stacked matrices."""
        groups = self.pick((1, 2), (3, 1))
        count, hidden = 2 * groups, 1 + self.choose(3)
        correction = [self.parameter(count)] if self.chance(25) else []
        settings = {"k": 1 + self.choose(2), "scores": self.pick(("softmax", "sigmoid"), (2, 1)), "groups": groups}
        weights = self.node("top_k", self.matmul(u, count), *correction, normalise=not self.chance(30),
                            scale=self.pick((1.0, 2.5), (3, 1)), **settings)  # fmt: skip
        repeated = self.node("repeat", weights, times=hidden, width=count * hidden)
        value = self.node("activation", self.matmul(u, count * hidden), fn=self.pick(FUNCTIONS))
        if self.chance(40):
            up = self.matmul(u, count * hidden)
            up = self.node("clamp", up, low=-1.0, high=1.0) if self.chance(20) else up
            value = self.node("multiply", value, up)
        return self.matmul(self.node("multiply", value, repeated), self.widths[u])

    def spread(self, share: str, width: int) -> str:
        """One number as a vector of equal numbers."""
        return share if width == 1 else self.node("concat", *[share] * width, width=width)

    # -- the block ---------------------------------------------------------------------------------

    def block(self) -> Document:
        streams = ["x"]
        for layer in range(1 + self.choose(3)):
            v = streams[-1] if self.chance(85) else self.pick(streams)
            read = self.norm(v) if self.chance(35) else v
            mixes = layer == 0 or self.chance(25)
            branch = self.mix(read) if mixes else self.chain(read, 2)
            if mixes and self.chance(30):
                branch = self.chain(branch, 1)
            branch = self.fit(branch, self.width)
            branch = self.norm(branch) if self.chance(20) else branch
            streams.append(self.combined(v, branch, streams))
        y = streams[-1]
        y = self.fit(self.chain(y, 1), self.width) if self.chance(25) else y
        return self.document(y)

    def combined(self, v: str, branch: str, streams: Sequence[str]) -> str:
        match self.pick(("residual", "parallel", "alone", "several", "gated"), (8, 3, 3, 1, 1)):
            case "residual":
                return self.node("add", v, branch)
            case "parallel":
                other = self.fit(self.chain(v, 1), self.width)
                return self.node("add", *([v] if self.chance(60) else []), branch, other)
            case "several":
                return self.node("add", branch, *dict.fromkeys(streams))
            case "gated":
                return self.node("multiply", v, branch)
        return branch

    def document(self, output: str) -> Document:
        """The raw graph without what leads nowhere, and with a random choice of what may move."""
        if output not in self.nodes:
            output = self.bias(output)
        read, stack = {output}, [output]
        while stack:
            for arg in self.nodes[stack.pop()]["args"]:
                if arg in self.nodes and arg not in read:
                    stack.append(arg)
                read.add(arg)
        nodes = {n: node for n, node in self.nodes.items() if n in read}
        stored = [n for n in self.parameters if n in read]
        chosen = self._movable(stored)
        parameters: dict[str, Any] = {}
        for name in stored:
            flags = {} if name in chosen else {"tied" if self.chance(10) else "frozen": True}
            parameters[name] = {"shape": self.parameters[name], **flags}
        return {
            "graph": {"input": "x", "output": output, "width": self.width, "parameters": parameters, "nodes": nodes}
        }

    def _movable(self, stored: Sequence[str]) -> set[str]:
        policy = self.pick(("all", "some", "one", "two"), (3, 3, 4, 2))
        if policy == "all" or not stored:
            return set(stored)
        if policy == "some":
            return {n for n in stored if self.chance(50)}
        return {stored[self.choose(len(stored))] for _ in range(1 if policy == "one" else 2)}


def design(choose: Choose) -> Document:
    """A random block, `{"graph": ...}`."""
    return Draft(choose).block()


def seeded(seed: int) -> Document:
    """The block of a plain seed."""
    rng = np.random.default_rng(seed)
    return design(lambda n: int(rng.integers(n)))


@st.composite
def designs(draw: st.DrawFn) -> Document:
    """The same blocks, drawn by Hypothesis, so that a failure shrinks."""
    return design(lambda n: draw(st.integers(0, n - 1)))


def shown(document: Document) -> str:
    return json.dumps(document)
