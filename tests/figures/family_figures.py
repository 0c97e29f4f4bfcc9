"""The handbook's table of Hugging Face families: a tiny random model of each against its own class.

python tests/figures/family_figures.py prints it; --write puts it into the handbook's data (`make families`).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import families
import numpy as np
import results
from family_cases import CASES, IDS, POSITIONS, Family, relative
from processes import python

from blockkit.absorbing.executor import reference
from blockkit.absorbing.run import logits_of, run_stream

HEAD = ("case", "model type", "float64 reference", "float32 Keras on JAX", "absorb: worst patched / floor",
        "least unpatched / floor")  # fmt: skip


def row(family: Family, on_keras: np.ndarray) -> tuple[str, ...]:
    """The errors of one case, relative to its largest logit."""
    executor = reference(family.model, "float64")
    ours = logits_of(executor, run_stream(executor, IDS, POSITIONS))
    theirs = families.logits_of_class(family.theirs, IDS, POSITIONS)
    runs = [family.absorbed(strategy) for strategy in (None, "matrix")]
    patched = max(found.measured.linf / measured.floor.linf for found, measured in runs)
    unpatched = min(measured.unpatched.linf / measured.floor.linf for _, measured in runs)
    exact = relative(ours, family.pair.logits(IDS, POSITIONS))
    keras = relative(on_keras, theirs)
    return (
        family.name,
        f"`{CASES[family.name][0]}`",
        f"{exact:.1e}",
        f"{keras:.1e}",
        f"{patched:.2f}",
        f"{unpatched:.0e}",
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = [Family(case, folder / case) for case in CASES]
        for family in made:
            _ = family.pair
        np.save(folder / "ids.npy", IDS)
        checks = str(Path(families.__file__).with_name("family_checks.py"))
        python(checks, str(folder), *CASES, home=folder, KERAS_BACKEND="jax")
        table = results.Table.of(HEAD, (row(family, np.load(folder / f"{family.name}.npy")) for family in made))
    print(table)
    if "--write" in sys.argv:
        results.write("families", [table], packages=("transformers", "torch", "jax", "keras"))


if __name__ == "__main__":
    main()
