"""Recheck a patch with NumPy alone: nothing of blockkit is imported.

    blockkit verify gemma3 --dump gemma3.npz
    python examples/recheck.py gemma3.npz

Runs the block with the original parameters in the context, and with the patched parameters without it. Exit status 1
if the two differ, or if a parameter moved that may not. A value is `[width]`, or `[tokens, width]` for several tokens.
"""

import json
import math
import sys
from functools import partial

import numpy as np

EXACT = 1e-9


def sigmoid(u):
    return 1 / (1 + np.exp(-u))


def softmax(u):
    e = np.exp(u - u.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def normed(u, eps):
    return u / np.sqrt(np.mean(u * u, axis=-1, keepdims=True) + eps)


def largest(u, k):
    """Ones where one of the k largest stands, the first of equals, else zeros."""
    order = np.argsort(-u, axis=-1, kind="stable")[..., :k]
    found = np.zeros_like(u)
    np.put_along_axis(found, order, 1.0, axis=-1)
    return found


def top_k(u, correction=0.0, k=1, scores="softmax", normalise=True, scale=1.0, groups=1, top_groups=1, eps=0.0):
    score = softmax(u) if scores == "softmax" else sigmoid(u)
    ranked = score + correction
    if groups > 1:
        parts = ranked.reshape(*u.shape[:-1], groups, -1)
        best = (parts * largest(parts, min(2, parts.shape[-1]))).sum(axis=-1)
        ranked = np.where(largest(best, top_groups)[..., None] > 0, parts, -np.inf).reshape(u.shape)
    kept = score * largest(ranked, k)
    return scale * (kept / (kept.sum(axis=-1, keepdims=True) + eps) if normalise else kept)


FUNCTIONS = {
    "identity": lambda u: u,
    "relu": lambda u: np.maximum(u, 0),
    "relu2": lambda u: np.maximum(u, 0) ** 2,
    "leaky_relu": lambda u: np.where(u < 0, 0.01 * u, u),
    "silu": lambda u: u * sigmoid(u),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "quick_gelu": lambda u: u * sigmoid(1.702 * u),
    "gelu": lambda u: 0.5 * u * (1 + np.vectorize(math.erf)(u / math.sqrt(2))),
    "gelu_tanh": lambda u: 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))),
}
OPERATIONS = {
    "add": lambda *terms: sum(terms),
    "multiply": lambda a, b, offset=0.0: a * (offset + b),
    "scale": lambda u, alpha: alpha * u,
    "matmul": lambda z, w: z @ w.T,  # w is [d_out, d_in]
    "rms_norm": lambda u, eps=1e-6: normed(u, eps),
    "layer_norm": lambda u, eps=1e-5: normed(u - u.mean(axis=-1, keepdims=True), eps),
    "activation": lambda u, fn: FUNCTIONS[fn](u),
    "softcap": lambda u, cap: cap * np.tanh(u / cap),
    "softmax": softmax,
    "concat": lambda *parts: np.concatenate(parts, axis=-1),
    "slice": lambda u, start, stop: u[..., start:stop],
    "repeat": lambda u, times: np.repeat(u, times, axis=-1),
    "clamp": lambda u, low=None, high=None: np.clip(u, low, high),
    "top_k": top_k,
}


def run(graph, dump, parameters, side):
    """The block's output with `parameters/NAME` of the dump, in its contextual or reduced run."""
    values = {graph["input"]: dump["input"], **{n: dump[f"{parameters}/{n}"] for n in graph["parameters"]}}
    waiting = dict(graph["nodes"])
    while waiting:
        ready = [n for n, node in waiting.items() if all(a in values for a in node["args"])]
        for name in ready:
            node = waiting.pop(name)
            args = [values[a] for a in node["args"]]
            settings = {k: v for k, v in node.items() if k not in ("op", "args")}
            if node["op"] == "mix":  # the stand-in for what looks at other tokens: sum_i M_i arg_i + offset
                matrix = [f"mix/{name}/matrix/{i}" for i in range(len(args))]
                terms = [u @ dump[m].T for u, m in zip(args, matrix, strict=True) if m in dump]
                values[name] = sum(terms) + dump[f"mix/{name}/offset/{side}"]
            else:
                values[name] = partial(OPERATIONS[node["op"]], *args)(**settings)
        if not ready:
            sys.exit(f"the graph has a cycle through {', '.join(waiting)}")
    return values[graph["output"]]


def distance(found, wanted):
    """max |found - wanted| / max |wanted|."""
    return float(np.abs(found - wanted).max() / (np.abs(wanted).max() or 1.0))


def main(path):
    with np.load(path) as file:
        dump = dict(file)
    graph = json.loads(str(dump["graph"]))["graph"]
    moved = [n for n in graph["parameters"] if not np.array_equal(dump[f"parameter/{n}"], dump[f"patched/{n}"])]
    held = [n for n in moved if graph["parameters"][n].get("tied") or graph["parameters"][n].get("frozen")]
    wanted = run(graph, dump, "parameter", "contextual")
    left = distance(run(graph, dump, "patched", "reduced"), wanted)
    before = distance(run(graph, dump, "parameter", "reduced"), wanted)
    claimed = distance(dump["output/contextual"], wanted)
    print(f"moved: {', '.join(moved) or 'nothing'}")
    print(f"without a patch {before:.3g}, patched {left:.3g}, contextual output as dumped {claimed:.3g} (all relative)")
    if held:
        print(f"these may not move: {', '.join(held)}")
    return 0 if left <= EXACT and claimed <= EXACT and not held else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print(__doc__)
    else:
        sys.exit(main(sys.argv[1]))
