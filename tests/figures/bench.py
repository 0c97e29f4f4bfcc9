"""Speed and memory of absorbing a 500-token context, against one plain contextual forward.

    python tests/figures/bench.py [--write] [BACKEND ...]        (or: make bench)

For each backend a fresh process runs both in turn, A B A B ..., after a warm-up of each (compilation is
not counted), and prints the median seconds and their ratio; peak memory comes from two more processes,
one that only runs the forward and one that only absorbs. Both sides compute logits for the query alone.
--write puts the table into the handbook's data.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import results

CONTEXT_TOKENS, QUERY_TOKENS, RUNS = 500, 10, 7
STRATEGIES = ("stable", "minimal", "matrix", "paper")
BACKENDS = ("numpy", "jax", "tensorflow", "torch")
HEAD = ("backend", "strategy", "forward", "absorb", "ratio", "peak memory, ratio")


def prepare(backend: str) -> tuple[Callable[[], Any], Callable[[str], Any]]:
    """The plain forward and the absorption, on the real Gemma 3 270M."""
    import numpy as np

    from blockkit.absorbing import algorithm
    from blockkit.absorbing.backends import open_executor
    from blockkit.absorbing.run import logits_of, run_stream
    from blockkit.checkpoint.cache import resolve_model
    from blockkit.checkpoint.model import open_model
    from blockkit.checkpoint.tokenizer import load_tokenizer

    model = open_model(resolve_model("gemma3-270m"))
    executor = open_executor(model, backend, "float32")
    text = " ".join(f"Item {i} of the list is a {w}." for i in range(80) for w in ("stone", "river", "cloud"))
    ids = np.array(load_tokenizer(model.folder.path).encode(text, special=True))[: CONTEXT_TOKENS + QUERY_TOKENS]
    positions = np.arange(len(ids))
    request = algorithm.Request(ids[:CONTEXT_TOKENS], ids[CONTEXT_TOKENS:])

    def forward() -> Any:
        return logits_of(executor, run_stream(executor, ids, positions)[CONTEXT_TOKENS:])

    def absorb(strategy: str) -> Any:
        return algorithm.absorb(executor, request, strategy)

    return forward, absorb


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def timed(backend: str) -> dict[str, Any]:
    forward, absorb = prepare(backend)
    found: dict[str, Any] = {}
    for strategy in STRATEGIES:
        forward(), absorb(strategy)
        pairs = [(seconds(forward), seconds(lambda s=strategy: absorb(s))) for _ in range(RUNS)]  # type: ignore[misc]
        found[strategy] = {
            "forward": statistics.median(a for a, _ in pairs),
            "absorb": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(b / a for a, b in pairs),
        }
    return found


def peak(backend: str, what: str) -> dict[str, float]:
    """Peak memory of this process in MiB after three runs of one thing."""
    forward, absorb = prepare(backend)
    for _ in range(3):
        forward() if what == "forward" else absorb("stable")
    return {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def child(backend: str, what: str) -> Any:
    env = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", backend, what], env=env, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        backend, what = sys.argv[2:]
        print(json.dumps(timed(backend) if what == "time" else peak(backend, what)))
        return
    asked = [a for a in sys.argv[1:] if a != "--write"]
    rows = []
    for backend in asked or [b for b in BACKENDS if b == "numpy" or find_spec(b)]:
        times = child(backend, "time")
        plain, absorbing = (child(backend, what)["mib"] for what in ("forward", "absorb"))
        for strategy, row in times.items():
            measured = (f"{row['forward']:.2f} s", f"{row['absorb']:.2f} s", f"{row['ratio']:.2f}")
            rows.append((backend, strategy, *measured, f"{absorbing / plain:.2f}"))
            print(*rows[-1], file=sys.stderr, flush=True)
    table = results.Table.of(HEAD, rows)
    print(table)
    if "--write" in sys.argv:
        results.write("speed", [table], packages=[b for b in BACKENDS[1:] if find_spec(b)])


if __name__ == "__main__":
    main()
