"""The README's table: the five prompts on the real Gemma 3 270M, by backend and strategy.

python tests/figures/figures.py [BACKEND ...]        (or: make figures)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def main() -> None:
    print(
        "| backend | strategy | no patch, least | patched, worst | floor, least | worst patched / floor | same top-1 |"
    )
    print("|---|---|---|---|---|---|---|")
    for backend in sys.argv[1:] or ("numpy", "jax", "tensorflow", "torch"):
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
            errors = f"{unpatched:.1f} | {worst:.1e} | {floor:.1e} | {ratio:.2f}"
            print(f"| {backend} | {strategy} | {errors} | {agree}/{len(found)} |", flush=True)


if __name__ == "__main__":
    main()
