"""The handbook's catalogue: what the planner derives for every family, all at the same sizes.

python tests/figures/tables.py prints it; --write puts it into the handbook's data (`make table`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import results

from blockkit.design import catalog
from blockkit.errors import BadInput, NotPatchable
from blockkit.graph.graph import Graph
from blockkit.planner.plan import make_plan
from blockkit.planner.route import Route
from blockkit.planner.verdict import Verdict, judge

ANSWERS = {True: "yes", False: "no", None: "unknown"}
STRATEGIES = ("stable", "minimal", "matrix", "paper")
HEAD = ("architecture", "patchable", "tokens", "by one parameter (tokens)", *STRATEGIES, "what makes it special")
SHOWN = 4  # routes in a cell
SIZES: dict[str, int] = {
    "d_model": 1024, "d_ff": 4096, "heads": 12, "kv_heads": 4, "head_dim": 64, "layers": 24,
    "experts": 8, "top_k": 2, "shared": 2048, "d_dense": 2048, "value_dim": 128,
    "rope_dim": 32, "nope_dim": 64, "q_rank": 384, "kv_rank": 256, "groups": 4, "top_groups": 2,
    "inner": 2048, "state": 16, "dt_rank": 64, "kernel": 4, "d_tokens": 512, "places": 196, "length": 2048,
}  # fmt: skip


def row(graph: Graph) -> tuple[str, ...]:
    """The columns that follow from the graph alone."""
    unknown = sorted({symbol for shape in graph.shapes.values() for size in shape for symbol in size.symbols})
    if unknown:
        raise BadInput(f"give {', '.join(unknown)} a number in SIZES")
    verdict = judge(graph)
    capacity = str(verdict.capacity) if verdict.patchable else "-"
    return (ANSWERS[verdict.patchable], capacity, routes(verdict), *(stored(graph, s) for s in STRATEGIES))


def routes(verdict: Verdict) -> str:
    """The outermost routes, `?` where a condition fails for whole regions; else why there are none."""
    single = [r for r in verdict.routes if len(r.parameters) == 1]
    shown = [short(r) for r in single[:SHOWN]]
    if len(single) > SHOWN:
        shown.append(f"{len(single) - SHOWN} more")
    if not single and verdict.obstructions:
        return verdict.obstructions[0].reason
    return ", ".join(shown) or "only several together"


def short(route: Route) -> str:
    """One parameter, how many tokens it serves, and whether that is for sure."""
    part = " of one expert" if route.steps[0].block else ""
    return f"`{route.parameters[0]}`{part} ({route.capacity}){' ?' if route.conditional else ''}"


def stored(graph: Graph, strategy: str) -> str:
    """How many numbers the patch of one block holds, for one token."""
    try:
        return str(make_plan(graph, strategy).numbers_stored)
    except NotPatchable:
        return "-"


def rows() -> Iterator[tuple[str, ...]]:
    """One row a family; blocks of a family that differ for the planner have rows of their own."""
    for family in catalog.families():
        architecture = catalog.entry(family).bound(SIZES, family)
        found: dict[tuple[str, ...], list[str]] = {}
        for kind, graph in architecture.graphs.items():
            found.setdefault(row(graph), []).append(kind)
        for columns, kinds in found.items():
            name = family if len(found) == 1 else f"{family} ({', '.join(kinds)})"
            yield (name, *columns, architecture.note)


def catalogue() -> results.Table:
    """One row a family, all at the same sizes."""
    return results.Table.of(HEAD, rows())


if __name__ == "__main__":
    made = catalogue()
    print(made)
    if "--write" in sys.argv:
        results.write("catalogue", [made])
