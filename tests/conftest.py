"""What every test has: one thread a process, and the command line in a folder of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch load: processes share the cores

from command_line import CommandLine

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on any machine
settings.load_profile("busy")

FIRST = ("test_gemma", "test_keras_model", "test_keras_hub", "test_conformance", "test_torch_generation")


def pytest_configure(config: pytest.Config) -> None:
    """Whole modules go to the workers (`--dist loadfile`) in our order, not by how many tests they hold."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(monkeypatch, capsys)
