"""Conformance suites for every executor: run in a process of its own per backend, they print records.

    KERAS_BACKEND=jax python tests/support/conformance.py jax [tiny] [mutations] [gemma] [logits=FOLDER]

`records.py` runs them; `test_conformance.py` and `test_gemma.py` judge what they print.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from blockkit.absorbing import algorithm, lockstep
from blockkit.absorbing.backends import open_executor
from blockkit.absorbing.executor import Executor
from blockkit.absorbing.measure import Reference, measure
from blockkit.absorbing.metrics import compare
from blockkit.absorbing.request import Request
from blockkit.absorbing.run import logits_of, run_stream
from blockkit.checkpoint.cache import resolve_model
from blockkit.checkpoint.model import Model, open_model
from blockkit.checkpoint.tokenizer import load_tokenizer
from blockkit.errors import BlockkitError
from blockkit.graph.changes import Change, MatrixChange, VectorChange
from blockkit.planner.plan import STRATEGIES
from blockkit.planner.routes import Step

Record = dict[str, Any]
References = dict[bytes, Reference]  # by the contextual logits that they are measured against

PROMPTS = (
    "Write a single-sentence weather forecast for Mars, from the perspective of a slightly annoyed robot:",
    "Constraint: No 'e's. Topic: The meaning of life. Length: Exactly 20 words. Write:",
    "Explain what a 'bug' is in computer programming, but explain it to a 16th-century medieval peasant. "
    "Use 20 words or less:",
    "Topic: Three siblings named Jack, Fred, and Alice. Task: Write one 5-7-5 haiku about them:",
    "We can absorb the impact of a prompt for a modern language model such as Gemma into the MLP weights. "
    "Write a two-line rhyming couplet about this fact:",
)

TINY: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "query_pre_attn_scalar": 10, "num_hidden_layers": 3, "vocab_size": 50, "max_position_embeddings": 64,
        "sliding_window": 6, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "llama": {
        "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 3, "vocab_size": 50, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False,
    },
    "gpt2": {
        "n_embd": 24, "n_inner": 40, "n_head": 4, "n_layer": 3, "vocab_size": 50, "n_positions": 64,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
    },
}  # fmt: skip


def tiny_model(family: str, folder: Path) -> Model:
    """A checkpoint with random weights, written tensor by tensor in the family's own names."""
    from safetensors.numpy import save_file

    from blockkit.checkpoint.model import from_config, slots

    config = {"model_type": family, **TINY[family]}
    architecture, conventions = from_config(config, "tiny")
    rng = np.random.default_rng(7)
    tensors = {}
    for slot, shape in slots(architecture):
        entry = conventions["tensors"][".".join("*" if p.isdigit() else p for p in slot.split("."))]
        value = rng.normal(size=shape).astype(np.float32) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        if slot.endswith("norm.scale") and family != "gemma3_text":
            value += 1
        name, turned = (entry, False) if isinstance(entry, str) else (entry["tensor"], True)
        layer = slot.split(".")[1] if slot.startswith("layers.") else ""
        tensors[name.replace("*", layer, 1)] = np.ascontiguousarray(value.T if turned else value)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return open_model(folder)


def record(executor: Executor, request: Request, strategy: str | None, known: References) -> Record:
    """What an absorbed context measures, or the error that refuses it."""
    try:
        absorbed = algorithm.absorb(executor, request, strategy)
    except BlockkitError as error:
        return {"error": type(error).__name__, "message": str(error)}
    contextual = absorbed.contextual.tobytes()
    if contextual not in known:  # no strategy has a part in the runs that are compared with these logits
        known[contextual] = measure(executor, absorbed)
    reference = known[contextual]
    return {
        "linf": absorbed.measured.linf,
        "top1": absorbed.measured.top1_agree,
        "unpatched": reference.unpatched.linf,
        "floor": reference.floor.linf,
        "residual": max(absorbed.residual_by_block),
        "parameters": sorted({p for overlay in absorbed.overlays.values() for p in overlay}),
    }


def tiny(backend: str) -> Iterator[Record]:
    """Every family, strategy and mode on small random models, and logits against the float64 reference."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 50, size=16)
    for family in TINY:
        with tempfile.TemporaryDirectory() as folder:
            model = tiny_model(family, Path(folder) / "model")
            executor, oracle = open_executor(model, backend, "float32"), open_executor(model, "numpy", "float64")
            logits = [logits_of(e, run_stream(e, ids, np.arange(16))) for e in (executor, oracle)]
            yield {"family": family, "mode": "logits", "linf": compare(*logits).linf}
            for mode in ("last", "each", "all"):
                request, known = Request(ids[:12], ids[12:], mode), References()
                for strategy in (None, *STRATEGIES):
                    found = record(executor, request, strategy, known)
                    yield {"family": family, "mode": mode, "strategy": strategy, **found}


@functools.cache
def real(backend: str) -> tuple[Executor, tuple[np.ndarray, ...]]:
    """The real Gemma 3 270M, and the five prompts' ids."""
    folder = resolve_model("gemma3-270m")
    tokenizer = load_tokenizer(folder)
    prompts = tuple(np.array(tokenizer.encode(prompt, special=True)) for prompt in PROMPTS)
    return open_executor(open_model(folder), backend, "float32"), prompts


def gemma(backend: str) -> Iterator[Record]:
    """The five prompts on the real Gemma 3 270M: the last words are the query, the rest is the context."""
    executor, prompts = real(backend)
    for number, ids in enumerate(prompts, 1):
        request, known = Request(ids[:-4], ids[-4:]), References()
        for strategy in ("paper", "minimal", "matrix", "stable"):
            yield {"prompt": number, "strategy": strategy, **record(executor, request, strategy, known)}


def logits(backend: str, folder: Path) -> Iterator[Record]:
    """The five prompts' ids, and their logits in files of the folder."""
    executor, prompts = real(backend)
    for number, ids in enumerate(prompts, 1):
        file = folder / f"{backend}{number}.npy"
        np.save(file, logits_of(executor, run_stream(executor, ids, np.arange(len(ids)))))
        yield {"prompt": number, "ids": ids.tolist(), "file": str(file)}


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def mutations(backend: str) -> Iterator[Record]:
    """Deliberate faults: each must be noticed by the measurement, or the measurement is worth nothing."""
    ids = np.random.default_rng(3).integers(0, 50, size=16)
    request = Request(ids[:12], ids[12:])
    solve = lockstep.solve_step

    def wrong_law(step: Step, *rest: Any) -> Change:
        change = solve(step, *rest)
        if isinstance(change, MatrixChange):
            return MatrixChange(0.9 * change.left, change.right, change.per_token)
        return VectorChange(0.9 * change.delta, change.per_token)

    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model("gemma3_text", Path(folder) / "model")
        executor = open_executor(model, backend, "float32")
        yield {"fault": "none", **record(executor, request, "minimal", {})}
        with replaced(lockstep, "solve_step", wrong_law), replaced(lockstep, "REFINEMENTS", 0):
            yield {"fault": "wrong law", **record(executor, request, "minimal", {})}
        yield from _by_hand(executor, request)
        # A uniform shift means nothing to rotary positions; learned ones must notice it.
        model = tiny_model("gpt2", Path(folder) / "gpt2")
        yield from _by_hand(open_executor(model, backend, "float32"), request, "learned positions: ")


def _by_hand(executor: Executor, request: Request, label: str = "") -> Iterator[Record]:
    """The edited model run as it should be, without one block's patch, and one position late."""
    good = algorithm.absorb(executor, request, "minimal")
    skipped = {layer: o for layer, o in good.overlays.items() if layer != 1}
    for fault, overlays, positions in (
        ("none, by hand", good.overlays, request.positions),
        ("skipped patch", skipped, request.positions),
        ("shifted position", good.overlays, request.positions + 1),
    ):
        stream = run_stream(executor, request.query, positions, overlays)[-1:]
        yield {"fault": label + fault, "linf": compare(logits_of(executor, stream), good.contextual).linf}


def main(backend: str, *suites: str) -> None:
    for suite in suites:
        name, _, folder = suite.partition("=")
        made = logits(backend, Path(folder)) if name == "logits" else SUITES[name](backend)
        for found in made:
            print(json.dumps({"suite": name, **found}), flush=True)


SUITES = {"tiny": tiny, "mutations": mutations, "gemma": gemma}
if __name__ == "__main__":
    main(*sys.argv[1:])
