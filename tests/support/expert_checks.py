"""Small mixtures of experts of every kind, and what `test_experts.py` runs of them in a process of its own.

    KERAS_BACKEND=jax python expert_checks.py CHECKPOINT

prints a JSON object: for each kind, how far Keras in float32 is from NumPy in float64; and what became of a context
absorbed on Keras into one expert a layer of the checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from blockkit.design.spec import architecture_from, parse_document
from blockkit.graph.arrays import Arrays, NumpyArrays
from blockkit.graph.evaluate import evaluate
from blockkit.graph.graph import Graph
from blockkit.graph.packing import Packing

WIDTH, HIDDEN = 12, 5

# name -> settings of the component; see `HF` in test_experts.py for whose they are
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"experts": 6, "top_k": 2},
    "qwen2-moe": {"experts": 6, "top_k": 2, "normalise": False, "shared": 7, "shared_gate": True},
    "qwen3-moe": {"experts": 7, "top_k": 3},
    "deepseek-v3": {
        "experts": 9, "top_k": 3, "scores": "sigmoid", "eps": 1e-20, "scale": 2.5, "correction": True, "groups": 3,
        "top_groups": 2, "shared": 10},
    "gpt-oss": {
        "experts": 6, "top_k": 2, "activation": "quick_gelu", "router_bias": True, "bias": True, "limit": 0.7,
        "up_offset": 1.0},
    "llama4": {"experts": 6, "top_k": 2, "scores": "sigmoid", "normalise": False, "weigh": "input", "shared": HIDDEN},
    "switch": {"experts": 6, "top_k": 1, "activation": "relu", "gated": False, "normalise": False},
}  # fmt: skip


def graph_of(settings: dict[str, Any]) -> Graph:
    """The experts alone, on a stream of 12 coordinates."""
    node = {"component": "experts", "input": "x", "hidden": HIDDEN, **settings}
    return _graph({"mlp": node}, "mlp")


def block_of(settings: dict[str, Any]) -> Graph:
    """A block whose experts stand behind attention and a norm."""
    nodes = {
        "attention": {"component": "attention", "input": "x", "heads": 3, "head_dim": 8},
        "v": {"component": "add", "inputs": ["x", "attention"]},
        "mlp_norm": {"component": "rms_norm", "input": "v"},
        "mlp": {"component": "experts", "input": "mlp_norm", "hidden": HIDDEN, **settings},
        "y": {"component": "add", "inputs": ["v", "mlp"]},
    }
    return _graph(nodes, "y")


def _graph(nodes: dict[str, Any], output: str) -> Graph:
    document = {"width": WIDTH, "block": {"nodes": nodes, "output": output}}
    return architecture_from(document, parse_document("{}", "experts")[1]).graphs["block"]


def run(graph: Graph, parameters: Any, x: Any, xp: Arrays | None = None) -> Any:
    """The result of the experts alone, `[tokens, width]`."""
    packing = Packing(np.arange(x.shape[0]), (x.shape[0],))
    return evaluate(graph, xp or NumpyArrays(), parameters, {graph.input: x}, [graph.output], packing)[graph.output]


def drawn(graph: Graph, seed: int = 0, tokens: int = 40) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Parameters and a stream; the router's logits are far enough apart for float32 to choose alike."""
    rng = np.random.default_rng(seed)
    found = {p.name: rng.normal(size=tuple(int(s.known or 0) for s in p.shape)) for p in graph.parameters}
    return found, rng.normal(size=(tokens, WIDTH))


def on_keras() -> dict[str, float]:
    """For each kind, max |Keras float32 - NumPy float64| / max |NumPy float64|, compiled."""
    from blockkit.backends.keras.arrays import KerasArrays

    xp, found = KerasArrays(), {}
    for name, settings in KINDS.items():
        graph = graph_of(settings)
        parameters, x = drawn(graph)

        def compiled(stored: Any, x: Any, graph: Graph = graph) -> Any:
            return run(graph, stored, x, xp)

        stored = {n: xp.asarray(p, "float32") for n, p in parameters.items()}
        theirs = xp.to_numpy(xp.jit(compiled)(stored, xp.asarray(x, "float32")))
        ours = run(graph, parameters, x)
        found[name] = float(np.abs(theirs - ours).max() / np.abs(ours).max())
    return found


def absorbed_on_keras(checkpoint: Path) -> dict[str, Any]:
    """Errors of the edited model's own run, and the most experts that any layer changes for a token."""
    from blockkit.absorbing import algorithm
    from blockkit.absorbing.measure import measure
    from blockkit.absorbing.request import Request
    from blockkit.backends.keras.executor import open_jax
    from blockkit.checkpoint.model import open_model
    from blockkit.graph.changes import MatrixChange

    model = open_model(checkpoint)
    executor = open_jax(model)
    ids = np.random.default_rng(3).integers(0, int(model.architecture.constants["vocabulary"]), 12)
    found = algorithm.absorb(executor, Request(ids[:8], ids[8:], "each"), "minimal")
    measured = measure(executor, found)
    experts = int(model.architecture.constants["experts"])
    changed = [
        int(np.asarray(change.right).reshape(len(change.right), experts, -1).any(axis=2).sum(axis=1).max())
        for overlay in found.overlays.values()
        for change in overlay.values()
        if isinstance(change, MatrixChange)
    ]
    return {"linf": found.measured.linf, "floor": measured.floor.linf, "unpatched": measured.unpatched.linf,
            "parameters": sorted({name for overlay in found.overlays.values() for name in overlay}),
            "experts": max(changed)}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps({"forward": on_keras(), "absorbed": absorbed_on_keras(Path(sys.argv[1]))}))
