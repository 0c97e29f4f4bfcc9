"""Answers take work in proportion to the size of the graph, whatever the number of blocks; `make scale` has seconds."""

from __future__ import annotations

from pathlib import Path

import operations
import pytest
from operations import counted
from processes import python
from scale import SHAPES, answer

import blockkit as bk

SMALL, LARGE = 500, 5_000
MOST_RATIO = 11.0  # linear is 10; a quadratic step anywhere is 100
MOST_CALLS = 600_000  # two tenths of a second, most of them for the modules that are needed


@pytest.mark.parametrize("shape", SHAPES)
def test_work_grows_with_the_number_of_nodes(shape: str) -> None:
    found = []
    for count in (SMALL, LARGE):
        graph = SHAPES[shape](count)
        with counted() as work:
            answer(graph)
        found.append(work.calls)
    print(f"\n{shape}: {found[0]:,} and {found[1]:,} calls")
    assert found[1] <= MOST_RATIO * found[0]


def test_a_model_of_126_blocks_is_judged_and_planned_with_few_calls(tmp_path: Path) -> None:
    """In a new process, which has nothing imported and nothing remembered."""
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from operations import counted
import blockkit as bk
with counted() as work:
    assert bk.check("llama3-405b").patchable and bk.plan("llama3-405b").steps
print(work.calls)
"""
    calls = int(python("-c", program, Path(operations.__file__).parent, home=tmp_path))
    print(f"\n{calls:,} calls")
    assert calls <= MOST_CALLS


def test_the_number_of_blocks_costs_nothing() -> None:
    def calls(name: str) -> int:
        bk.load(name)
        with counted() as work:
            assert bk.check(name).patchable and bk.plan(name).steps
        return work.calls

    blocks = [int(bk.load(name).constants["layers"]) for name in ("llama3-8b", "llama3-405b")]  # type: ignore[union-attr]
    assert blocks == [32, 126]
    assert calls("llama3-405b") <= 1.1 * calls("llama3-8b")


def test_names_are_found_without_parsing_the_catalogue() -> None:
    from blockkit.design import catalog

    entries = {family: catalog.entry(family) for family in catalog.families()}
    assert catalog.names() == [n for f, e in entries.items() for n in (f, *(f"{f}-{v}" for v in e.variants))]
    assert catalog.model_types() == {e.checkpoint["model_type"]: f for f, e in entries.items() if e.checkpoint}
