"""The handbook's table of absorbing: the five prompts on the real Gemma 3 270M, by backend and strategy.

python tests/figures/figures.py [--write] [BACKEND ...]        (or: make figures)

--write puts the table into the handbook's data.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import results

BACKENDS = ("numpy", "jax", "tensorflow", "torch")
HEAD = ("backend", "strategy", "no patch, least", "patched, worst", "floor, least", "worst patched / floor",
        "same top-1")  # fmt: skip


def main() -> None:
    made = []
    for backend in [a for a in sys.argv[1:] if a != "--write"] or BACKENDS:
        env = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        script = str(Path(__file__).parents[1] / "support" / "conformance.py")
        done = subprocess.run(
            [sys.executable, script, backend, "gemma"], env=env, stdout=subprocess.PIPE, check=True, text=True
        )
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                rows[json.loads(line)["strategy"]].append(json.loads(line))
        for strategy, found in rows.items():
            unpatched, floor = (min(r[k] for r in found) for k in ("unpatched", "floor"))
            worst, ratio = max(r["linf"] for r in found), max(r["linf"] / r["floor"] for r in found)
            agree = sum(r["top1"] == 1 for r in found)
            errors = (f"{unpatched:.1f}", f"{worst:.1e}", f"{floor:.1e}", f"{ratio:.2f}")
            made.append((backend, strategy, *errors, f"{agree}/{len(found)}"))
            print(*made[-1], file=sys.stderr, flush=True)
    table = results.Table.of(HEAD, made)
    print(table)
    if "--write" in sys.argv:
        results.write("figures", [table], packages=("jax", "keras", "tensorflow", "torch"))


if __name__ == "__main__":
    main()
