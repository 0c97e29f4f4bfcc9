"""A numerical attack on a verdict: Levenberg-Marquardt over all free parameters of a raw graph.

Contexts and starts form one batch `B`: a value is `[B, tokens, width]`, a moving parameter `[B, *shape]`. The
Jacobian is exact: cotangents `[B, d, tokens, width]` of all `d` outputs are pulled back at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from oracle import ACTIVATIONS, Arrays, affine, distance, ordered, run, scored, sigmoid

SOLVED = 1e-9  # relative error at which a descent may stop: the block is reproduced


@dataclass(frozen=True)
class Instance:
    """A block with numbers and a context for it; offsets and stream are `[tokens, width]`."""

    graph: Mapping[str, Any]
    parameters: Arrays
    stream: np.ndarray
    matrices: Mapping[str, Sequence[np.ndarray]]
    contextual: Arrays
    reduced: Arrays

    @property
    def free(self) -> list[str]:
        return [n for n, p in self.graph["parameters"].items() if not (p.get("tied") or p.get("frozen"))]


def slope(fn: str, u: np.ndarray) -> np.ndarray:
    """The derivative of an activation."""
    match fn:
        case "identity":
            return np.ones_like(u)
        case "relu":
            return np.where(u > 0, 1.0, 0.0)
        case "leaky_relu":
            return np.where(u > 0, 1.0, 0.01)
        case "tanh":
            return 1 - np.tanh(u) ** 2
        case "sigmoid":
            return sigmoid(u) * (1 - sigmoid(u))
        case "silu":
            return sigmoid(u) * (1 + u * (1 - sigmoid(u)))
        case "gelu":
            density = np.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
            return (ACTIVATIONS["gelu"](u) / np.where(u == 0, 1, u)) + 0.5 * (u == 0) + u * density
        case "gelu_tanh":
            inner = np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))
            rise = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * u**2)
            return 0.5 * (1 + inner) + 0.5 * u * (1 - inner**2) * rise
    raise ValueError(f"no slope for {fn!r}")


def _unnormed(g: np.ndarray, y: np.ndarray, u: np.ndarray, eps: float) -> np.ndarray:
    """Pulls `g` back through y = u / sqrt(mean(u^2) + eps)."""
    size = np.sqrt(np.mean(u * u, axis=-1, keepdims=True) + eps)
    return (g - y * np.mean(g * y, axis=-1, keepdims=True)) / size


def pull(
    node: Mapping[str, Any], position: int, g: np.ndarray, y: np.ndarray, args: Sequence[np.ndarray]
) -> np.ndarray:
    """The cotangent `[B, d, tokens, width]` of a signal argument; `y` and `args` have an axis for `d`."""
    u = args[0]
    match node["op"]:
        case "add":
            return g
        case "multiply":
            return g * (args[1] + node.get("offset", 0.0) if position == 0 else u)
        case "scale":
            return g * node["alpha"]
        case "matmul":
            return g @ args[1]
        case "rms_norm":
            return _unnormed(g, y, u, node.get("eps", 1e-6))
        case "layer_norm":
            g = _unnormed(g, y, u - u.mean(axis=-1, keepdims=True), node.get("eps", 1e-5))
            return g - g.mean(axis=-1, keepdims=True)
        case "activation":
            return g * slope(node["fn"], u)
        case "softcap":
            return g * (1 - np.tanh(u / node["cap"]) ** 2)
        case "softmax":
            return y * (g - np.sum(g * y, axis=-1, keepdims=True))
        case "concat":
            start = sum(a.shape[-1] for a in args[:position])
            return g[..., start : start + args[position].shape[-1]]
        case "top_k":
            return _routed(node, g, args) if position == 0 else np.zeros_like(g)
        case "repeat":
            return g.reshape(*g.shape[:-1], u.shape[-1], node["times"]).sum(axis=-1)
        case "clamp":
            return g * (np.clip(u, node.get("low"), node.get("high")) == u)
        case "slice":
            whole = np.zeros((*g.shape[:-1], u.shape[-1]))
            whole[..., node["start"] : node["stop"]] = g
            return whole
    raise ValueError(f"no derivative for {node['op']!r}")


def _routed(node: Mapping[str, Any], g: np.ndarray, args: Sequence[np.ndarray]) -> np.ndarray:
    """Pulls `g` back through a router, the choice held."""
    scores, chosen = scored(node, args)
    g = g * node.get("scale", 1.0)
    if node.get("normalise", True):
        kept = scores * chosen
        size = kept.sum(axis=-1, keepdims=True)
        g = (g - np.sum(g * kept, axis=-1, keepdims=True) / size) / size
    g = g * chosen
    if node.get("scores", "softmax") == "sigmoid":
        return np.asarray(g * scores * (1 - scores))
    return np.asarray(scores * (g - np.sum(g * scores, axis=-1, keepdims=True)))


class Attack:
    """Several contexts (instances that share graph and parameters), attacked together."""

    def __init__(self, instances: Sequence[Instance]) -> None:
        first = instances[0]
        self.graph, self.base, self.matrices = first.graph, first.parameters, first.matrices
        self.free = [n for n in first.free if any(n in node["args"] for node in self.graph["nodes"].values())]
        self.sizes = [self.base[n].size for n in self.free]
        self.order = ordered(self.graph)
        self.stream = np.stack([i.stream for i in instances])
        self.reduced = {n: np.stack([i.reduced[n] for i in instances]) for n in first.reduced}
        self.wanted = np.stack([self._contextual(i) for i in instances])

    def _contextual(self, i: Instance) -> np.ndarray:
        return run(self.graph, i.parameters, i.stream, affine(i.matrices, i.contextual))[self.graph["output"]]

    def parameters(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """The moved parameters of `theta [B, numbers]`, the others as they are."""
        parts = np.split(theta, np.cumsum(self.sizes)[:-1], axis=1) if self.free else []
        moved = {n: p.reshape(-1, *self.base[n].shape) for n, p in zip(self.free, parts, strict=True)}
        return {**self.base, **moved}

    def values(self, theta: np.ndarray, which: np.ndarray) -> dict[str, np.ndarray]:
        """The reduced run of contexts `which [B]` under `theta [B, numbers]`."""
        mix = affine(self.matrices, {n: o[which] for n, o in self.reduced.items()})
        return run(self.graph, self.parameters(theta), self.stream[which], mix)

    def jacobian(self, theta: np.ndarray, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """`[B, tokens * d, numbers]`."""
        graph, stored = self.graph, self.parameters(theta)
        batch, tokens, d = values[graph["output"]].shape
        cotangents = {graph["output"]: np.broadcast_to(np.eye(d)[None, :, None, :], (batch, d, tokens, d))}
        found = {n: np.zeros((batch, tokens, d, size)) for n, size in zip(self.free, self.sizes, strict=True)}

        def operand(name: str) -> np.ndarray:
            if name in values:
                return values[name][:, None]
            p = stored[name]
            if len(graph["parameters"][name]["shape"]) == 1:
                p = p[..., None, :]
            return p[:, None] if name in found else p

        for name in reversed(self.order):
            node, g = graph["nodes"][name], cotangents.pop(name, None)
            if g is None:
                continue
            signals = [k for k, a in enumerate(node["args"]) if a in values]
            args = [] if node["op"] == "mix" else [operand(a) for a in node["args"]]
            for position, arg in enumerate(node["args"]):
                if arg in found:
                    if node["op"] == "matmul":
                        part = np.einsum("bdto,bti->btdoi", g, values[node["args"][0]])
                    else:
                        part = np.swapaxes(pull(node, position, g, operand(name), args), 1, 2)
                    found[arg] += part.reshape(found[arg].shape)
                elif arg in graph["nodes"]:
                    if node["op"] == "mix":
                        back = g @ self.matrices[name][signals.index(position)]
                    else:
                        back = pull(node, position, g, operand(name), args)
                    cotangents[arg] = cotangents[arg] + back if arg in cotangents else back
        flat = [found[n].reshape(batch, tokens * d, -1) for n in self.free]
        return np.concatenate(flat, axis=2) if flat else np.zeros((batch, tokens * d, 0))

    def errors(self, starts: int, steps: int, seed: int = 0, which: Sequence[int] | None = None) -> np.ndarray:
        """The least relative L-inf error reached for each context (of `which`), over all starts."""
        contexts = np.arange(len(self.wanted)) if which is None else np.asarray(which)
        chosen = np.repeat(contexts, starts)
        rng = np.random.default_rng(seed)
        flat = np.concatenate([self.base[n].ravel() for n in self.free] or [np.zeros(0)])
        spread = np.tile(np.linspace(0, 3, starts), len(contexts))[:, None]
        theta = flat + spread * rng.normal(size=(len(chosen), flat.size))
        with np.errstate(all="ignore"):
            return self._descend(theta, chosen, steps).reshape(len(contexts), starts).min(axis=1)

    def _descend(self, theta: np.ndarray, which: np.ndarray, steps: int) -> np.ndarray:
        output, scale = self.graph["output"], np.abs(self.wanted).max(axis=(1, 2)) + 1e-300

        def miss(values: Mapping[str, np.ndarray], which: np.ndarray) -> np.ndarray:
            left = (values[output] - self.wanted[which]).reshape(len(which), -1)
            return np.where(np.isfinite(left), left, 1e100)

        best, active, damping = np.full(len(which), np.inf), np.arange(len(which)), np.full(len(which), 1e-2)
        values = self.values(theta, which)
        left = miss(values, which)
        for step in range(steps + 1):
            best[active] = np.abs(left).max(axis=1) / scale[which]
            solved = {int(w) for w in which[best[active] < SOLVED]}
            keep = (damping[active] < 1e12) & np.array([int(w) not in solved for w in which])
            if step == steps or not keep.any() or not theta.shape[1]:
                break
            if not keep.all():
                active, theta, which, left = active[keep], theta[keep], which[keep], left[keep]
                values = {n: v[keep] for n, v in values.items()}
            j = np.nan_to_num(self.jacobian(theta, values), nan=0.0, posinf=0.0, neginf=0.0)
            gram = j @ np.swapaxes(j, 1, 2)
            size = np.trace(gram, axis1=1, axis2=2) / gram.shape[1] + 1e-30
            damped = gram + (damping[active] * size)[:, None, None] * np.eye(gram.shape[1])
            move = np.einsum("brp,br->bp", j, np.linalg.solve(damped, left[..., None])[..., 0])
            tried = theta - np.where(np.isfinite(move), move, 0.0)
            again = self.values(tried, which)
            after = miss(again, which)
            better = np.sum(after**2, axis=1) < np.sum(left**2, axis=1)
            damping[active] = np.where(better, np.maximum(damping[active] / 8, 1e-13), damping[active] * 5)
            theta = np.where(better[:, None], tried, theta)
            left = np.where(better[:, None], after, left)
            values = {n: np.where(better[:, None, None], again[n], v) for n, v in values.items()}
        return best


__all__ = ["SOLVED", "Attack", "Instance", "distance"]
