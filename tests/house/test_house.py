"""The house: rooms that import one way, files that fit in the head, the rule on a screen."""

import ast
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = [ROOT / "blockkit", ROOT / "backends"]
MODULES = sorted(path for top in LIBRARY for path in top.rglob("*.py"))
FOLDERS = sorted({path.parent for path in MODULES})
MOST_MODULES, MOST_LINES, MOST_RULE = 16, 400, 40


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def contract(house: Path) -> subprocess.CompletedProcess[str]:
    """What `make lint` says of the imports of a house."""
    run = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    return subprocess.run([sys.executable, "-c", run], cwd=house, capture_output=True, text=True)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the library that may be damaged."""
    for top in LIBRARY:
        shutil.copytree(top, tmp_path / top.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("blockkit/graph/sizes.py", "from ..planner.route import Link", "Rooms"),
        ("blockkit/planner/route.py", "from .verdict import judge", "The planner"),
        ("blockkit/graph/ops/base.py", "from ..evaluate import evaluate", "The graph"),
        ("blockkit/design/spec.py", "from blockkit.checkpoint import model", "Rooms"),
        ("blockkit/absorbing/run.py", "def late():\n    import torch", "no framework"),
        ("blockkit/views/svg.py", "from ..cli import main", "Rooms"),
        ("backends/pytorch/calling/interface.py", "from ..editing import editor", "The PyTorch backend"),
        ("backends/keras/model.py", "from ..pytorch import blocks", "Backends know nothing"),
    ],
)
def test_an_import_that_runs_up_breaks_the_contract(house: Path, module: str, line: str, broken: str) -> None:
    with (house / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = contract(house)
    assert done.returncode == 1, done.stdout
    assert any(broken in text and "BROKEN" in text for text in done.stdout.splitlines())


def test_the_contract_holds(house: Path) -> None:
    done = contract(house)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_room_says_what_it_holds() -> None:
    untold = [f for f in FOLDERS if not ast.get_docstring(ast.parse((f / "__init__.py").read_text(encoding="utf-8")))]
    assert names(untold) == []


def test_no_room_is_crowded_and_no_module_is_long() -> None:
    crowd = Counter(path.parent for path in MODULES if path.name != "__init__.py")
    assert {names([f])[0]: n for f, n in crowd.items() if n > MOST_MODULES} == {}
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in MODULES}
    assert {names([p])[0]: n for p, n in lines.items() if n > MOST_LINES} == {}


def test_the_rule_fits_on_a_screen() -> None:
    tree = ast.parse((ROOT / "blockkit/planner/rule.py").read_text(encoding="utf-8"))
    (rule,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Rule"]
    lines = {n.name: n.end_lineno - n.lineno + 1 for n in rule.body if isinstance(n, ast.FunctionDef) and n.end_lineno}
    assert all(lines[name] <= MOST_RULE for name in ("restore", "steer"))


def test_every_room_is_packaged() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"])
    rooms = {name.replace("/", ".") for name in names(FOLDERS)}
    assert listed == {r if r.startswith("blockkit") else f"blockkit.{r}" for r in rooms}
