"""Random designs: every yes is carried out, every no is attacked, and the evaluator agrees with a page of NumPy.

A second thousand, and the designs that Hypothesis draws, are in `test_attack_drawn.py`, for another process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attack
import numpy as np
import oracle
import pytest
from designs import seeded

from blockkit.planner.verdict import judge
from blockkit.trials import trial

FOUND = json.loads((Path(attack.__file__).with_name("counterexamples.json")).read_text())
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_a_thousand_designs() -> None:
    """A yes is exact, by every strategy and at every route's capacity; a no has a context beyond any solver."""
    attack.insist(range(1_000))


@pytest.mark.parametrize("found", FOUND, ids=[f["what"] for f in FOUND])
def test_what_was_found_before(found: dict[str, Any]) -> None:
    """Answers that an attack has refuted, or that could be decided: they stay as they were put right."""
    graph = attack.lowered(found)
    verdict, record = judge(graph), attack.examine(found, 7)
    assert (record.answer, str(verdict.capacity)) == (found["answer"], found["capacity"])
    assert not record.wrong, record.faults


def test_the_evaluator_agrees_with_a_page_of_numpy() -> None:
    for seed in range(200):
        document = seeded(seed)
        graph = attack.lowered(document)
        (instance,) = attack.instances(document, graph, seed, 1, tokens=2)
        drawn = trial.draw(graph, seed * 1000, 2)
        for side, offsets in ((True, instance.contextual), (False, instance.reduced)):
            mix = oracle.affine(instance.matrices, offsets)
            ours = oracle.run(document["graph"], instance.parameters, instance.stream, mix)[graph.output]
            theirs = trial.run(drawn, side, (graph.output,))[graph.output]
            assert np.allclose(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_the_solver_knows_its_derivatives() -> None:
    """Its Jacobian against differences; a wrong one would make every no look right."""
    for seed in range(60):
        document = seeded(seed)
        force = attack.Attack(attack.instances(document, attack.lowered(document), seed, 1, tokens=2))
        here = np.concatenate([force.base[n].ravel() for n in force.free] or [np.zeros(0)])[None]
        way, which = 1e-6 * np.random.default_rng(seed).normal(size=here.shape), np.zeros(1, int)

        def output(theta: np.ndarray, force: attack.Attack = force, which: np.ndarray = which) -> np.ndarray:
            return force.values(theta, which)[force.graph["output"]].ravel()

        found = force.jacobian(here, force.values(here, which))[0] @ way[0]
        wanted = (output(here + way) - output(here - way)) / 2
        assert np.allclose(found, wanted, atol=1e-3 * np.abs(wanted).max(initial=0.0), equal_nan=True), seed
