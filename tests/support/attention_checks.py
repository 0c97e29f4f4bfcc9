"""Small attention blocks of every kind, and what `test_attention.py` runs of them in a process of its own.

    python attention_checks.py          (the environment's KERAS_BACKEND says which backend)

prints a JSON object: for each block, how far the Keras backend in float32 is from NumPy in float64.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from blockkit.design.spec import architecture_from, parse_document
from blockkit.graph.arrays import Arrays, NumpyArrays
from blockkit.graph.evaluate import evaluate
from blockkit.graph.graph import Graph
from blockkit.graph.ops.mixing import MixingOp
from blockkit.graph.packing import Packing

WIDTH, MEMORY, MEMORY_WIDTH = 32, 9, 20
LLAMA3 = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 32}
YARN = {"kind": "yarn", "base": 500.0, "factor": 4.0, "original_length": 16, "beta_fast": 2.0, "beta_slow": 0.5}
LATENT = {"heads": 4, "kv_rank": 12, "nope_dim": 6, "rope_dim": 4, "value_dim": 10}

# name -> (component, settings); all see 32 coordinates and have 4 heads of 8 unless they say otherwise
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("attention", {}),
    "qkv-bias": ("attention", {"kv_heads": 2, "rope": {}, "bias": True, "out_bias": False}),
    "some-biases": ("attention", {"bias": ["q", "v"], "out_bias": True, "causal": False}),
    "fused": ("attention", {"fused": True, "bias": True, "value_dim": 5, "kv_heads": 2}),
    "partial-rope": ("attention", {"rope": {"dim": 4}, "bias": True}),
    "interleaved-rope": ("attention", {"rope": {"dim": 4, "interleaved": True}}),
    "per-head-norm": ("attention", {
        "kv_heads": 2, "rope": {"interleaved": True}, "qk_norm": {"kind": "layer", "scale": "per_head", "eps": 1e-5}}),
    "norm-over-all": ("attention", {"kv_heads": 2, "rope": {}, "qk_norm": {"over": "all"}}),
    "shared-norm-bias": ("attention", {
        "rope": {"dim": 4}, "bias": True, "qk_norm": {"kind": "layer", "bias": True, "eps": 1e-5}}),
    "norm-after-rope": ("attention", {"rope": {}, "qk_norm": {"after_rope": True}}),
    "bare-norm": ("attention", {"rope": {}, "qk_norm": {"scale": False}}),
    "alibi": ("attention", {"alibi": True, "bias": True}),
    "alibi-scaled": ("attention", {"alibi": "scaled", "bias": True, "kv_heads": 1}),
    "alibi-clip": ("attention", {"heads": 6, "head_dim": 8, "alibi": True, "clip": 0.5}),
    "relative-bias": ("attention", {"relative_bias": {"buckets": 8, "max_distance": 20}, "scale": 1.0}),
    "relative-bias-both-ways": ("attention", {
        "relative_bias": {"buckets": 8, "max_distance": 20}, "scale": 1.0, "causal": False}),
    "sinks": ("attention", {"kv_heads": 2, "head_dim": 6, "sinks": True, "bias": True, "window": 5,
                            "rope": {**YARN, "truncate": False}}),
    "llama3-rope": ("attention", {"kv_heads": 2, "rope": LLAMA3}),
    "yarn-rope": ("attention", {"kv_heads": 2, "rope": YARN}),
    "softcap": ("attention", {"softcap": 1.5, "scale_dim": 14, "rope": {"scaling": 8.0}, "window": 6}),
    "window-both-ways": ("attention", {"causal": False, "window": 4, "rope": {}}),
    "chunk": ("attention", {"chunk": 5, "rope": {"interleaved": True}}),
    "no-output-projection": ("attention", {"value_dim": 8, "out_proj": False}),
    "latent": ("latent_attention", {**LATENT, "q_rank": 14, "scale": 0.5, "rope": {**YARN, "interleaved": True}}),
    "latent-full-queries": ("latent_attention", {**LATENT, "rope": {"interleaved": True}}),
    "cross": ("cross_attention", {"memory_width": MEMORY_WIDTH, "head_dim": 6, "scale": 1.0}),
    "cross-bias": ("cross_attention", {"memory_width": MEMORY_WIDTH, "bias": True, "kv_heads": 2}),
}  # fmt: skip
POSITION_FREE = ("cross", "cross-bias")
BOTH_WAYS = ("some-biases", "relative-bias-both-ways", "window-both-ways")


def block_of(name: str, width: int = WIDTH, constants: bool = False) -> Graph:
    """The graph of one attention component; with `constants`, all its numbers are set by name."""
    kind, settings = KINDS[name]
    known: dict[str, Any] = {}
    given = _named({"heads": 4, **settings}, known) if constants else {"heads": 4, **settings}
    node = {"component": kind, "input": "x", **given}
    document = {"width": width, "constants": known, "block": {"nodes": {"attention": node}, "output": "attention"}}
    return architecture_from(document, parse_document("{}", name)[1]).graphs["block"]


def _named(settings: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The settings with a name in place of each number; the numbers go to `known`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found[key] = _named(value, known)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            symbol = found[key] = f"number_{len(known)}"
            known[symbol] = value
        else:
            found[key] = value
    return found


def parameters_of(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """Matrices of scale 1.5/sqrt(d_in), so that attention is far from even; vectors around one half."""
    rng = np.random.default_rng(seed)
    found = {}
    for p in graph.parameters:
        shape = tuple(int(s.known or 0) for s in p.shape)
        scale = 1.5 * shape[-1] ** -0.5 if len(shape) == 2 else 0.5
        found[p.name] = rng.normal(size=shape) * scale + (0.5 if len(shape) == 1 else 0.0)
    return found


def signals(tokens: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A stream `[tokens, 32]` and a memory `[9, 20]`."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tokens, WIDTH)), rng.normal(size=(MEMORY, MEMORY_WIDTH))


def run(graph: Graph, xp: Arrays, parameters: Any, x: Any, packing: Packing) -> Any:
    """The block's result, `[tokens, width]`."""
    node = next(n for n in graph.nodes if isinstance(n.op, MixingOp))

    def mixer(node: Any, args: list[Any], at: Packing) -> Any:
        return node.op.mix(xp, args, at, at.past.get(node.name))

    wants = [graph.output, node.name]
    return evaluate(graph, xp, parameters, {graph.input: x}, wants, packing, mixer=mixer)[graph.output]


def alone(graph: Graph, parameters: Any, x: np.ndarray, at: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """One sequence by itself."""
    found: np.ndarray = run(graph, NumpyArrays(), parameters, x, Packing(at, (len(x),), memory=(memory,)))
    return found


def on_keras() -> dict[str, float]:
    """For each kind, max |Keras float32 - NumPy float64| / max |NumPy float64| of a compiled, packed run."""
    from blockkit.backends.keras.arrays import KerasArrays

    xp, found, segments = KerasArrays(), {}, (12, 9)
    at = np.concatenate([np.arange(n) + 3 for n in segments])
    for name in KINDS:
        graph = block_of(name)
        parameters = parameters_of(graph)
        x, memory = signals(sum(segments))

        def compiled(stored: Any, x: Any, at: Any, memory: Any, graph: Graph = graph) -> Any:
            return run(graph, xp, stored, x, Packing(at, segments, memory=(memory, memory[:5])))

        stored = {n: xp.asarray(p, "float32") for n, p in parameters.items()}
        given = (xp.asarray(x, "float32"), xp.asarray(at, "int32"), xp.asarray(memory, "float32"))
        theirs = xp.to_numpy(xp.jit(compiled)(stored, *given))
        ours = run(graph, NumpyArrays(), parameters, x, Packing(at, segments, memory=(memory, memory[:5])))
        found[name] = float(np.abs(theirs - ours).max() / np.abs(ours).max())
    return found


if __name__ == "__main__":
    print(json.dumps(on_keras()))
