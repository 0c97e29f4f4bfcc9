"""What the conformance suites print, for the tests that judge it."""

from __future__ import annotations

import functools
import json
from importlib.util import find_spec
from pathlib import Path

import conformance
import pytest
from conformance import Record
from processes import python


@functools.cache
def records(backend: str, home: Path, *suites: str) -> dict[str, list[Record]]:
    """What every suite prints on a backend; all of them in one process."""
    if backend != "numpy" and find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    found: dict[str, list[Record]] = {suite.partition("=")[0]: [] for suite in suites}
    for line in python(conformance.__file__, backend, *suites, home=home, KERAS_BACKEND=backend).splitlines():
        if line.startswith("{"):
            record = json.loads(line)
            found[record.pop("suite")].append(record)
    return found
