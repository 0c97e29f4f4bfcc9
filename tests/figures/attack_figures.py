"""The README's attack table: random designs judged, carried out and attacked, in several processes.

python tests/figures/attack_figures.py [DESIGNS]        (or: make attack)
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # before NumPy: the work is split over processes

import attack  # noqa: E402
from designs import seeded, shown  # noqa: E402


def examined(seed: int) -> tuple[int, attack.Record]:
    warnings.simplefilter("ignore")
    return seed, attack.examine(seeded(seed), seed)


def table(records: Iterable[tuple[int, attack.Record]]) -> None:
    answers: Counter[str] = Counter()
    aside: Counter[str] = Counter()
    why: dict[str, Counter[str]] = {}
    runs, worst, least = 0, 0.0, float("inf")
    wrong: list[tuple[int, attack.Record]] = []
    for seed, record in records:
        answers[record.answer] += 1
        aside.update(record.aside)
        runs, worst = runs + record.runs, max(worst, record.worst)
        if record.answer == "no" and record.reached:
            least = min(least, max(record.reached))
        if record.answer == "unknown":
            why.setdefault(record.why, Counter())[record.outcome] += 1
        if record.wrong:
            wrong.append((seed, record))
    count = sum(answers.values())

    def share(part: int, whole: int) -> str:
        return f"{part} ({part / (whole or 1):.2%})"

    shares = (share(answers[a], count) for a in ("yes", "no", "open", "unknown"))
    _rows(
        ("designs", "yes", "no", "open condition", "unknown", "wrong answers"), [(str(count), *shares, str(len(wrong)))]
    )
    _rows(("plans run for a yes", "worst relative L-inf", *aside),
          [(str(runs), f"{worst:.1e}", *(share(n, runs) for n in aside.values()))])  # fmt: skip
    print(f"Least error that the solver left on the hardest context of a no: {least:.1e}.\n")
    _rows(("unknown because of", "designs", *attack.OUTCOMES),
          [(kind, share(found.total(), count), *(str(found[o]) for o in attack.OUTCOMES))
           for kind, found in sorted(why.items(), key=lambda item: -item[1].total())])  # fmt: skip
    for seed, record in wrong[:20]:
        print(f"seed {seed}: {record.answer} {record.faults[:1]} {shown(dict(record.document))}", file=sys.stderr)


def _rows(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    for row in (heads, ("---",) * len(heads), *rows):
        print(f"| {' | '.join(row)} |")
    print()


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with ProcessPoolExecutor() as pool:
        table(pool.map(examined, range(count), chunksize=50))


if __name__ == "__main__":
    main()
