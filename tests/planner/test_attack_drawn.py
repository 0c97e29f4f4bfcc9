"""More random designs: a second thousand of plain seeds, and those that Hypothesis draws and shrinks."""

from __future__ import annotations

from typing import Any

import attack
import pytest
from designs import designs
from hypothesis import HealthCheck, given, settings

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_another_thousand_designs() -> None:
    attack.insist(range(1_000, 2_000))


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(designs())
def test_drawn_designs(document: dict[str, Any]) -> None:
    """The same questions of designs that Hypothesis draws, so that a counterexample shrinks."""
    record = attack.examine(document)
    assert not record.wrong, record.faults
