"""The handbook's table of the attack: random designs judged, carried out and attacked, in several processes.

python tests/figures/attack_figures.py [DESIGNS] [--write]        (or: make attack)

--write puts the tables into the handbook's data.
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
import results  # noqa: E402
from designs import seeded, shown  # noqa: E402


def examined(seed: int) -> tuple[int, attack.Record]:
    warnings.simplefilter("ignore")
    return seed, attack.examine(seeded(seed), seed)


def tables(records: Iterable[tuple[int, attack.Record]]) -> tuple[list[results.Table], str]:
    """What came of the designs, and the least error that the solver left on a no."""
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
    answered = results.Table.of(
        ("designs", "yes", "no", "open condition", "unknown", "wrong answers"),
        [(str(count), *shares, str(len(wrong)))], "Answers",
    )  # fmt: skip
    carried = results.Table.of(
        ("plans run for a yes", "worst relative L-inf", *aside),
        [(str(runs), f"{worst:.1e}", *(share(n, runs) for n in aside.values()))], "Plans run for a yes",
    )  # fmt: skip
    hidden = results.Table.of(
        ("unknown because of", "designs", *attack.OUTCOMES),
        [(kind, share(found.total(), count), *(str(found[o]) for o in attack.OUTCOMES))
         for kind, found in sorted(why.items(), key=lambda item: -item[1].total())], "What an unknown hides",
    )  # fmt: skip
    for seed, record in wrong[:20]:
        print(f"seed {seed}: {record.answer} {record.faults[:1]} {shown(dict(record.document))}", file=sys.stderr)
    note = f"Least error that the solver left on the hardest context of a no: {least:.1e}."
    return [answered, carried, hidden], note


def main() -> None:
    asked = [a for a in sys.argv[1:] if a != "--write"]
    count = int(asked[0]) if asked else 20_000
    with ProcessPoolExecutor() as pool:
        made, note = tables(pool.map(examined, range(count), chunksize=50))
    print(*made, note, sep="\n\n")
    if "--write" in sys.argv:
        results.write("attack", made, [note])


if __name__ == "__main__":
    main()
