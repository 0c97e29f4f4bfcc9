"""A page of plain NumPy that evaluates a raw graph and rechecks a patch, without a line of the kit.

A value is `[..., tokens, width]`; a matrix is `[..., d_out, d_in]`, a vector `[..., width]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]
Mixing = Callable[[str, list[np.ndarray]], np.ndarray]


def sigmoid(u: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * u))


_erf = np.vectorize(math.erf, otypes=[float])

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda u: u,
    "relu": lambda u: np.where(u > 0, u, 0.0),
    "leaky_relu": lambda u: np.where(u > 0, u, 0.01 * u),
    "silu": lambda u: u * sigmoid(u),
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "gelu": lambda u: 0.5 * u * (1 + _erf(u / math.sqrt(2))),
    "gelu_tanh": lambda u: 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))),
}


def softmax(u: np.ndarray) -> np.ndarray:
    e = np.exp(u - u.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def normed(u: np.ndarray, eps: float) -> np.ndarray:
    return np.asarray(u / np.sqrt(np.mean(u * u, axis=-1, keepdims=True) + eps))


def top(u: np.ndarray, k: int) -> np.ndarray:
    """Ones at the `k` largest coordinates, zeros elsewhere."""
    mask = np.zeros_like(u)
    np.put_along_axis(mask, np.argsort(-u, axis=-1)[..., :k], 1.0, axis=-1)
    return mask


def scored(node: Mapping[str, Any], args: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A router's scores, and ones for the experts it chooses."""
    scores = softmax(args[0]) if node.get("scores", "softmax") == "softmax" else sigmoid(args[0])
    ranked, groups = scores + (args[1] if len(args) == 2 else 0.0), node.get("groups", 1)
    if groups > 1:
        grouped = ranked.reshape(*ranked.shape[:-1], groups, -1)
        best = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
        opened = np.repeat(top(best, node.get("top_groups", 1)), grouped.shape[-1], axis=-1)
        ranked = np.where(opened > 0, ranked, -np.inf)
    return scores, top(ranked, node["k"])


def weights(node: Mapping[str, Any], args: Sequence[np.ndarray]) -> np.ndarray:
    """What a router multiplies the experts by."""
    scores, chosen = scored(node, args)
    kept = scores * chosen
    if node.get("normalise", True):
        kept = kept / kept.sum(axis=-1, keepdims=True)
    return np.asarray(kept * node.get("scale", 1.0))


def apply(node: Mapping[str, Any], args: Sequence[np.ndarray]) -> np.ndarray:
    """The value of one node that is not a mixing node."""
    u = args[0]
    match node["op"]:
        case "add":
            return np.asarray(sum(args[1:], u))
        case "multiply":
            return u * (args[1] + node.get("offset", 0.0))
        case "scale":
            return u * node["alpha"]
        case "matmul":
            return u @ np.swapaxes(args[1], -1, -2)
        case "rms_norm":
            return normed(u, node.get("eps", 1e-6))
        case "layer_norm":
            return normed(u - u.mean(axis=-1, keepdims=True), node.get("eps", 1e-5))
        case "activation":
            return ACTIVATIONS[node["fn"]](u)
        case "softcap":
            return np.asarray(node["cap"] * np.tanh(u / node["cap"]))
        case "softmax":
            return softmax(u)
        case "concat":
            return np.concatenate(np.broadcast_arrays(*args) if len(args) == 1 else list(args), axis=-1)
        case "slice":
            return u[..., node["start"] : node["stop"]]
        case "top_k":
            return weights(node, args)
        case "repeat":
            return np.repeat(u, node["times"], axis=-1)
        case "clamp":
            return np.clip(u, node.get("low"), node.get("high"))
    raise ValueError(f"no meaning for {node['op']!r}")


def ordered(graph: Mapping[str, Any]) -> list[str]:
    """The names of the nodes, each after what it reads."""
    nodes, done = graph["nodes"], dict.fromkeys([graph["input"], *graph["parameters"]])
    stack = [graph["output"]]
    while stack:
        missing = [a for a in nodes[stack[-1]]["args"] if a not in done] if stack[-1] not in done else []
        if missing:
            stack.extend(missing)
        else:
            done[stack.pop()] = None
    return [n for n in done if n in nodes]


def run(graph: Mapping[str, Any], parameters: Arrays, stream: np.ndarray, mix: Mixing) -> dict[str, np.ndarray]:
    """The values of all nodes; `mix` gives a mixing node's value for the signals it reads."""
    stored = {n: p if len(graph["parameters"][n]["shape"]) == 2 else p[..., None, :] for n, p in parameters.items()}
    values = {graph["input"]: stream}
    for name in ordered(graph):
        node = graph["nodes"][name]
        if node["op"] == "mix":
            values[name] = mix(name, [values[a] for a in node["args"] if a in values])
        else:
            values[name] = apply(node, [values[a] if a in values else stored[a] for a in node["args"]])
    return values


def affine(matrices: Mapping[str, Sequence[np.ndarray]], offsets: Arrays) -> Mixing:
    """The stand-in for mixing nodes: `sum_i M_i arg_i + offset`."""

    def mix(name: str, signals: list[np.ndarray]) -> np.ndarray:
        terms = (u @ np.swapaxes(m, -1, -2) for u, m in zip(signals, matrices[name], strict=True))
        return np.asarray(sum(terms, offsets[name]))

    return mix


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """max |found - wanted| / max |wanted|."""
    return float(np.abs(found - wanted).max() / (np.abs(wanted).max() or 1.0))


def recheck(document: Mapping[str, Any], dump: Arrays) -> dict[str, float]:
    """Runs both sides of a dump: what the patch leaves, what no patch leaves, how far the dump's own claims are off.

    Raises:
        ValueError: a parameter that may not move has moved.
    """
    graph = document["graph"]
    mixers = [n for n, node in graph["nodes"].items() if node["op"] == "mix"]
    read = {n: sum(f"mix/{n}/matrix/{i}" in dump for i in range(len(graph["nodes"][n]["args"]))) for n in mixers}
    matrices = {n: [dump[f"mix/{n}/matrix/{i}"] for i in range(read[n])] for n in mixers}
    before = {n: dump[f"parameter/{n}"] for n in graph["parameters"]}
    after = {n: dump[f"patched/{n}"] for n in graph["parameters"]}
    for name, settings in graph["parameters"].items():
        if (settings.get("tied") or settings.get("frozen")) and not np.array_equal(before[name], after[name]):
            raise ValueError(f"{name} may not move, and has moved")

    def output(parameters: Arrays, side: str) -> np.ndarray:
        mix = affine(matrices, {n: dump[f"mix/{n}/offset/{side}"] for n in mixers})
        return run(graph, parameters, dump["input"], mix)[graph["output"]]

    wanted, found = output(before, "contextual"), output(after, "reduced")
    return {
        "relative_linf": distance(found, wanted),
        "unpatched_relative": distance(output(before, "reduced"), wanted),
        "claims": max(distance(dump["output/contextual"], wanted), distance(dump["output/patched"], found)),
    }
