"""Answers take time in proportion to the size of the graph, and a model of today's size takes no time to notice."""

from __future__ import annotations

import subprocess
import sys

import pytest
from scale import SHAPES, seconds

SMALL, LARGE = 2_000, 20_000
MOST_RATIO = 25.0  # linear is 10; a quadratic step anywhere is 100
SLACK = 4.0  # for a busy machine


@pytest.mark.parametrize("shape", SHAPES)
def test_time_grows_with_the_number_of_nodes(shape: str) -> None:
    small, large = SHAPES[shape](SMALL), SHAPES[shape](LARGE)
    least = min(sum(seconds(small)) for _ in range(3))
    most = sum(seconds(large))
    if most > MOST_RATIO * least:
        most = min(most, sum(seconds(large)))
    assert most <= MOST_RATIO * least


def test_a_model_of_126_blocks_is_judged_and_planned_in_three_tenths_of_a_second() -> None:
    program = """
import time
import blockkit as bk
start = time.process_time()
assert bk.check("llama3-405b").patchable and bk.plan("llama3-405b").steps
print(time.process_time() - start)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 0.3 * SLACK


def test_names_are_found_without_parsing_the_catalogue() -> None:
    from blockkit.design import catalog

    entries = {family: catalog.entry(family) for family in catalog.families()}
    assert catalog.names() == [n for f, e in entries.items() for n in (f, *(f"{f}-{v}" for v in e.variants))]
    assert catalog.model_types() == {e.checkpoint["model_type"]: f for f, e in entries.items() if e.checkpoint}
