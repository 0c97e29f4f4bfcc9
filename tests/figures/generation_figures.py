"""The handbook's table of generation: the paper's five prompts on the real Gemma 3 270M, 20 tokens each.

python tests/figures/generation_figures.py [--tokens N] [--write]        (or: make generation)

Every run is kept in build/generation.json, so that what was broken off goes on where it stopped (remove it to
measure anew); --write puts the tables into the handbook's data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import results
import torch
from conformance import PROMPTS
from transformers import AutoModelForCausalLM

from blockkit.absorbing.generation import Settings
from blockkit.backends.pytorch.generating.experiment import TransformersExperiment
from blockkit.checkpoint.cache import resolve_model
from blockkit.checkpoint.tokenizer import load_tokenizer
from blockkit.errors import BlockkitError

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "generation.json"
DTYPES, MODES, MERGES = ("float32", "bfloat16"), ("each", "all"), (False, True)
PROSE = (
    "Field notes, 14 March. The lighthouse on Skarv island is kept by Ingrid Solberg, who has a grey parrot called "
    "Magnus. Every evening at six she climbs the tower, lights the lamp, and reads the weather report aloud to the "
    "parrot. On Sundays a boat brings bread, oil and the newspapers of the whole week, and Ingrid reads them in the "
    "order in which they were printed, one each day, so that she is always a week behind the rest of the world. "
    "The sky is red today, the wind comes from the north with ninety kilometres an hour, and nobody is going to cross "
    "the sound before the morning. Ingrid has put the kettle on the stove and told"
)
QUERY = 40

Record = dict[str, Any]


@cache
def model(dtype: str) -> Any:
    folder = resolve_model("gemma3-270m")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


@cache
def tokenizer() -> Any:
    return load_tokenizer(resolve_model("gemma3-270m"))


def measured(prompt: str, settings: Settings, query: int = 1) -> Record:
    """One generation, with what its tokens and, for a static patch, its finished weights do."""
    ids = tokenizer().encode(prompt, special=True)
    run = TransformersExperiment(model(settings.dtype), ids, settings, query, stops=False)
    try:
        steps = list(run.steps())
    except BlockkitError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    yards = run.yardsticks()
    last, static = yards[query - 1 :], run.static()
    found: Record = {
        "text": tokenizer().decode([s.id for s in steps]),
        "agree": [s.id == s.patched_id for s in steps],
        "stable": [y.stable for y in yards],
        "linf": [s.linf for s in steps],
        "tvd": [s.tvd for s in steps],
        "floor": [y.floor.linf for y in yards],
        "floor_tvd": [y.floor.tvd for y in yards],
        "unpatched": [y.unpatched.linf for y in last],
        "margin": [y.margin for y in yards],
        "largest_logit": run.largest_logit,
        "seconds": [list(s.seconds) for s in steps],
    }
    if static is not None:
        found["static"] = {
            "linf": static.measured.linf,
            "tvd": static.measured.tvd,
            "agree": list(static.agree),
            "amplification": static.amplification,
        }
    return found


def runs(count: int) -> Iterator[tuple[str, Any]]:
    """Every run by its name, and how to make it."""
    for dtype, mode, merge in product(DTYPES, MODES, MERGES):
        settings = Settings(count, dtype, mode, merge=merge)
        for number, prompt in enumerate(PROMPTS, 1):
            yield f"{count} {dtype} {mode} {merge} {number}", lambda p=prompt, s=settings: measured(p, s)
    for dtype, merge, grown in product(DTYPES, MERGES, (1, 40)):
        settings = Settings(grown, dtype, "all", merge=merge)
        yield f"query {dtype} {merge} {grown}", lambda s=settings: measured(PROSE, s, QUERY)


def everything(count: int) -> dict[str, Record]:
    """All runs, those that were kept from earlier ones included."""
    found: dict[str, Record] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    for name, make in runs(count):
        if name not in found:
            print(name, file=sys.stderr, flush=True)
            found[name] = make()
            KEPT.parent.mkdir(exist_ok=True)
            partial = KEPT.with_suffix(".partial")
            partial.write_text(json.dumps(found))
            partial.replace(KEPT)
    return found


def main_table(found: dict[str, Record], count: int) -> results.Table:
    """A row for each dtype, mode and way to apply, over the five prompts."""
    head = ("dtype", "patch", "changes", "same token", "where the floor agrees", "L-inf", "TVD", "floor",
            "no patch, least", "finished weights: same token", "L-inf")  # fmt: skip
    rows = []
    for dtype, mode, merge in product(DTYPES, MODES, MERGES):
        parts = [found[f"{count} {dtype} {mode} {merge} {n}"] for n in range(1, len(PROMPTS) + 1)]
        patch = "one for each token" if mode == "each" else "one static, growing"
        row = [dtype, patch, "merged" if merge else "factored"]
        broken = [p["error"] for p in parts if "error" in p]
        if broken:
            rows.append([*row, f"{len(broken)} of {len(parts)} refused: {broken[0]}", *[""] * 7])
            continue
        agree, stable, *sizes = (
            [v for p in parts for v in p[k]] for k in ("agree", "stable", "linf", "tvd", "floor", "unpatched")
        )
        finished = ["-", "-"]
        if mode == "all":
            ends = [v for p in parts for v in p["static"]["agree"]]
            finished = [of(ends, stable), f"{max(p['static']['linf'] for p in parts):.1e}"]
        linf, tvd, floor = (f"{max(s):.1e}" for s in sizes[:3])
        row += [f"{sum(agree)}/{len(agree)}", of(agree, stable), linf, tvd, floor, f"{min(sizes[3]):.1f}", *finished]
        rows.append(row)
    return results.Table.of(head, rows, "The five prompts")


def long_table(found: dict[str, Record]) -> results.Table:
    """The query of 40 tokens: one static patch for all of it, and for 40 more."""
    head = ("dtype", "changes", "tokens", "one run of the finished weights: same token", "where the floor agrees",
            "L-inf", "TVD", "floor", "amplification")  # fmt: skip
    rows = []
    for grown, dtype, merge in product((1, 40), DTYPES, MERGES):
        record = found[f"query {dtype} {merge} {grown}"]
        tokens = f"{QUERY} of the query" if grown == 1 else f"{QUERY} of the query, {grown} generated"
        row = [dtype, "merged" if merge else "factored", tokens]
        if "error" in record:
            rows.append([*row, f"refused: {record['error']}", *[""] * 5])
            continue
        static, stable = record["static"], record["stable"]
        row += [f"{sum(static['agree'])}/{len(static['agree'])}", of(static["agree"], stable)]
        row += [f"{n:.1e}" for n in (static["linf"], static["tvd"], max(record["floor"]))]
        rows.append([*row, f"{static['amplification']:.0f}" if grown > 1 else "-"])
    return results.Table.of(head, rows, "A query of 40 tokens")


def of(agree: list[bool], stable: list[bool]) -> str:
    """How many agree of those on which the contextual model agrees with itself."""
    return f"{sum(a for a, s in zip(agree, stable, strict=True) if s)}/{sum(stable)}"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--tokens", type=int, default=20)
    words.add_argument("--write", action="store_true", help="put the tables into the handbook's data")
    given = words.parse_args()
    found = everything(given.tokens)
    made = [main_table(found, given.tokens), long_table(found)]
    print(*made, sep="\n\n")
    if given.write:
        results.write("generation", made, packages=("transformers", "torch"))


if __name__ == "__main__":
    main()
