"""How the time of an answer grows with the size of the graph.

    python tests/figures/bench_scale.py [--write]      (or: make scale)

For five shapes of graphs (`scale.py`), from 10 to 100,000 nodes: seconds of processor time for `check` (which, for a
no, also looks for the smallest change) and for `plan`, in one process. `--write` puts the table into the
handbook's data.
Beside the table it prints what `import blockkit` takes in a new process, and then a model of 126 blocks.
"""

from __future__ import annotations

import subprocess
import sys

import results
from scale import SHAPES, seconds

COUNTS = (10, 100, 1_000, 10_000, 100_000)
HEAD = ("nodes", "check, slowest shape", "plan, slowest shape", "both, per node, over the shapes")
NEW_PROCESS = """
import time
start = time.process_time()
import blockkit as bk
imported = time.process_time()
assert bk.check("llama3-405b").patchable and bk.plan("llama3-405b").steps
print(imported - start, time.process_time() - imported)
"""


def table() -> results.Table:
    """One row for each number of nodes, with the slowest shape's figures."""
    rows = []
    for count in COUNTS:
        found = [measured(name, count) for name in SHAPES]
        checked, planned = (max(times) for times in zip(*((c, p) for c, p, _ in found), strict=True))
        each = [1e6 * (c + p) / nodes for c, p, nodes in found]
        rows.append((f"{count:,}", f"{checked:.2g} s", f"{planned:.2g} s", f"{min(each):.0f} to {max(each):.0f} µs"))
    return results.Table.of(HEAD, rows)


def measured(name: str, count: int) -> tuple[float, float, int]:
    graph = SHAPES[name](count)
    checked, planned = (min(t) for t in zip(*(seconds(graph) for _ in range(repeats(count))), strict=True))
    print(
        f"{name}, {len(graph.nodes):,} nodes: check {checked:.3g} s, plan {planned:.3g} s", file=sys.stderr, flush=True
    )
    return checked, planned, len(graph.nodes)


def started() -> str:
    """The best of three new processes, with NumPy's share."""
    runs = [subprocess.run([sys.executable, "-c", NEW_PROCESS], capture_output=True, check=True) for _ in range(3)]
    imported, answered = (min(times) for times in zip(*(map(float, r.stdout.split()) for r in runs), strict=True))
    return f"import blockkit: {imported:.2f} s; check and plan of llama3-405b: {answered:.2f} s"


def repeats(count: int) -> int:
    return 3 if count <= 1_000 else 1


if __name__ == "__main__":
    print(started(), file=sys.stderr, flush=True)
    found = table()
    print(found)
    if "--write" in sys.argv:
        results.write("scale", [found])
