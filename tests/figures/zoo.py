"""The zoo: every causal-LM class of the installed transformers, small and random, absorbs a context.

python tests/figures/zoo.py prints a table (`make zoo`); --write puts it into the handbook's data, --json prints all
that was measured, --list only builds and runs the classes, --only GLOB chooses some, --jobs N works on several at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from typing import Any

import results
import torch
import transformers
import zoo_models
from zoo_runs import EQUAL, LEAST, WORST, Patched, Row, exact, examined

LIMIT = 120.0  # seconds for a class
PRELOADED = ["torch.export", "transformers.models.llama.modeling_llama", "blockkit.backends.pytorch"]


def worked(name: str, absorbing: bool, sender: Connection) -> None:
    """Examines a class in a process of its own."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sender.send(("last", examined(name, absorbing, note=lambda row: sender.send(("so far", row)))))


def supervised(name: str, absorbing: bool, limit: float) -> Row:
    """The row of a class, whatever happens to the process that works on it."""
    start = time.monotonic()
    processes = multiprocessing.get_context("forkserver")
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=worked, args=(name, absorbing, sender), daemon=True)
    process.start()
    sender.close()
    row = _received(Row(name), receiver, start + limit)
    process.join(1.0)  # killed at once, it would leave locks behind
    process.kill()
    process.join()
    return replace(row, seconds={**row.seconds, "all": round(time.monotonic() - start, 2)})


def _received(row: Row, receiver: Connection, end: float) -> Row:
    while receiver.poll(max(0.0, end - time.monotonic())):
        try:
            kind, row = receiver.recv()
        except EOFError:
            return replace(row, reason="its process ended without a word")
        if kind == "last":
            return row
    return replace(row, reason="not done within the time limit")


def rows(names: Iterable[str], absorbing: bool, jobs: int, limit: float) -> list[Row]:
    """One row a class, in order."""
    multiprocessing.set_forkserver_preload(PRELOADED)

    def one(name: str) -> Row:
        row = supervised(name, absorbing, limit)
        print(f"{row.seconds['all']:6.1f} s  {name}  {row.reason or 'done'}"[:200], file=sys.stderr, flush=True)
        return row

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, names))


# -- what is printed -------------------------------------------------------------------------------

HEAD = (
    "class", "blocks", "plan", "no patch", "patched", "as weights", "patched, `matrix`", "floor", "floor by", "exact",
)  # fmt: skip
LISTED = ("class", "numbers", "takes positions", "causal", "floor", "floor by", "seconds to build")


def tables(found: list[Row]) -> list[results.Table]:
    """Those that ran, then the rest with their reasons."""
    ran = [row for row in found if row.facts is not None]
    return [results.Table.of(HEAD, (_columns(row) for row in ran)), *_reasons(found)]


def summary(found: list[Row]) -> str:
    """How many were built, and how many of these are patched."""
    ran = [row for row in found if row.facts is not None]
    good = [row for row in ran if row.patched]
    share = f" ({100 * len(good) / len(ran):.1f} %)" if ran else ""
    matrix = sum(row.facts is not None and any(exact(p, row.facts.floor) for p in row.patches[1:]) for row in ran)
    return (
        f"transformers {transformers.__version__}: {len(found)} classes, {len(ran)} can be built and run on ids. "
        f"{len(good)}{share} of these are patched by the planner's default, {matrix} by `matrix`: the error is at most "
        f"{WORST} x the class's own floor, and without the patch at least {LEAST:,} x.{_outside(good)}"
    )


def _outside(good: list[Row]) -> str:
    names = ", ".join(f"`{row.name}`" for row in good if not row.patches[0].inside)
    return f" Patched only by a parameter that no block holds: {names}." if names else ""


def listing(found: list[Row]) -> str:
    """What `--list` prints: how the classes run."""
    lines = []
    for row in found:
        if row.facts is not None:
            facts = row.facts
            flags = ("yes" if facts.positions else "no", "yes" if facts.causal else "no")
            ways = ", ".join(facts.floors) or "rounding"
            seconds = str(row.seconds["build"])
            lines.append((f"`{row.name}`", f"{facts.parameters:,}", *flags, f"{facts.floor:.1e}", ways, seconds))
    return shown([results.Table.of(LISTED, lines), *_reasons(found)])


def shown(made: list[results.Table]) -> str:
    """The tables, each under its title."""
    return "\n\n".join(f"{table.title}\n\n{table}".lstrip() for table in made)


def _columns(row: Row) -> tuple[str, ...]:
    facts = row.facts
    if facts is None:
        raise ValueError(f"{row.name} did not run")
    first, second = (*row.patches, Patched(None), Patched("matrix"))[:2]
    kinds = len(set(row.blocks))
    blocks = f"{len(row.blocks)}" + (f" ({kinds} distinct)" if kinds != len(row.blocks) else "")
    ways = ", ".join(facts.floors) or f"rounding of {facts.scale:.2g}"
    plan = "; ".join(f"`{moved}`" for moved in first.moved) or "-"
    numbers = tuple(
        "-" if v is None else f"{v:.1e}" for v in (first.unpatched, first.error, first.merged, second.error)
    )
    answer = "yes" if row.patched else "**no**"
    if row.patched and not exact(second, facts.floor):
        answer = "yes (not with `matrix`)"
    return (f"`{row.name}`", blocks if row.blocks else "-", plan, *numbers, f"{facts.floor:.1e}", ways, answer)


def _reasons(found: list[Row]) -> list[results.Table]:
    """Tables of the classes that are missing, of those not patched, and of runs that were no use as a floor."""
    unequal = [(row.name, row.facts.unequal) for row in found if row.facts is not None and row.facts.unequal]
    lists = {
        "Not built, or not run on ids alone": [(row.name, row.reason) for row in found if row.facts is None],
        "Not patched": [(row.name, _why(row)) for row in found if _why(row)],
        "Left out of the floor, since the class's own runs differ by more than rounding": [
            (name, ", ".join(f"{way} {apart:.1e}" for way, apart in ways.items())) for name, ways in unequal
        ],
    }
    return [
        results.Table.of(("class", "reason"), ((f"`{name}`", text) for name, text in entries), title)
        for title, entries in lists.items()
        if entries
    ]


def _why(row: Row) -> str:
    """Why a class that runs is not patched; empty where it is, and where nothing was absorbed."""
    if row.facts is None or row.patched:
        return ""
    if row.reason or not row.patches:
        return row.reason
    first, floor = row.patches[0], row.facts.floor
    worst = max(first.error or 0.0, first.merged or 0.0)
    if worst > WORST * floor:
        return f"a patched run is {worst / floor:.1f} x its floor away"
    return f"the unpatched run is only {(first.unpatched or 0) / floor:.0f} x its floor away"


def as_json(found: list[Row]) -> dict[str, Any]:
    """All that was measured."""
    classes = []
    for row in found:
        floor = None if row.facts is None else row.facts.floor
        classes.append({**asdict(row), "floor": floor, "patched": row.patched})
    limits = {"worst": WORST, "least": LEAST, "equal": EQUAL}
    return {"transformers": transformers.__version__, "torch": torch.__version__, "limits": limits, "classes": classes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="classes whose names match, as Llama*")
    parser.add_argument("--list", action="store_true", help="build and run the classes, absorb nothing")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for a class")
    parser.add_argument("--json", action="store_true", help="print all that was measured")
    parser.add_argument("--write", action="store_true", help="put the table into the handbook's data")
    given = parser.parse_args()
    names = [name for name in zoo_models.classes() if fnmatchcase(name, given.only)]
    found = rows(names, not given.list, given.jobs, given.limit)
    made = listing(found) if given.list else f"{summary(found)}\n\n{shown(tables(found))}"
    if given.write and not given.list:
        results.write("zoo", tables(found), [summary(found)], ("transformers", "torch"))
    print(json.dumps(as_json(found), indent=1) if given.json else made)


if __name__ == "__main__":
    main()
