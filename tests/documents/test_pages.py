"""What pages show and name by hand: the block's drawing, and the tests that hold each promise."""

import re
from pathlib import Path

import blockkit as bk

ROOT = Path(__file__).parents[2]
HANDBOOK = ROOT / "examples" / "handbook"


def test_the_drawing_is_what_the_command_draws() -> None:
    drawn = bk.draw("gemma3", strategy="paper").svg.strip()
    shown = (HANDBOOK / "images" / "gemma3.svg").read_text(encoding="utf-8").strip()
    assert shown == drawn, "make it anew: blockkit plan gemma3 --strategy paper --svg"


def test_every_promise_names_tests_that_exist() -> None:
    tests = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    page = (HANDBOOK / "explanation" / "guarantees.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "|---"))]
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, f"no test holds: {row}"
        assert set(named) <= tests, f"no such test: {set(named) - tests}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 12_288
