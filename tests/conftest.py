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


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    return CommandLine(monkeypatch, capsys)
