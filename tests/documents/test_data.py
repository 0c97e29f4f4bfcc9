"""The handbook's data files: complete, shown, made by a named command, and right where that can be compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import results

ROOT = Path(__file__).parents[2]
HANDBOOK = ROOT / "examples" / "handbook"
NAMES = sorted(f.stem for f in results.FOLDER.glob("*.json"))
sys.path.append(str(ROOT / "tests" / "figures"))


@pytest.mark.parametrize("name", NAMES)
def test_a_data_file_is_shown_on_a_page_of_its_own(name: str) -> None:
    found = results.read(name)
    page = (HANDBOOK / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert f'{{{{ results("{name}") }}}}' in page
    assert found.title and found.about and found.tables and all(t.rows for t in found.tables)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found.date)


def commands() -> dict[str, str]:
    """What each target of the Makefile runs."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+):[^\n]*\n\t([^\n]*)", text, re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_one_named_command_makes_a_data_file_anew(name: str) -> None:
    command = results.read(name).command
    if not command:
        assert name == "rests-on"  # names of tests, compared below
        return
    run = commands()[command.removeprefix("make ")]
    script = re.search(r"/(\w+\.py).* --write", run)
    assert script, f"{command} does not write: {run}"
    text = (ROOT / "tests" / "figures" / script[1]).read_text(encoding="utf-8")
    assert f'results.write("{name}"' in text


@pytest.mark.parametrize("script", sorted((ROOT / "tests" / "figures").glob("*.py")), ids=lambda f: f.stem)
def test_a_script_finds_what_it_imports(script: Path) -> None:
    paths = re.search(r"^SCRIPT := PYTHONPATH=(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert paths
    env = {**os.environ, "PYTHONPATH": paths[1]}
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='imported')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_writing_changes_the_numbers_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = results.read("scale")
    (tmp_path / "scale.json").write_text(results.as_text(before), encoding="utf-8")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert results.read("scale") == before
    row = ("10", "1 s", "2 s", "a | b")
    results.write("scale", [results.Table.of(before.tables[0].columns, [row])], ["a note"])
    after = results.read("scale")
    assert after.tables[0].rows == (row,) and after.notes == ("a note",)
    assert (after.title, after.command, after.about) == (before.title, before.command, before.about)
    assert {"python", "numpy", "CPU cores"} <= after.made_with.keys()
    assert [f.name for f in tmp_path.iterdir()] == ["scale.json"]


def test_a_table_has_a_cell_for_every_column() -> None:
    with pytest.raises(ValueError, match="2 texts"):
        results.Table.of(("a", "b"), [("1",)])
    assert str(results.Table.of(("a",), [("x|y",)])).endswith("| x\\|y |")


def test_the_catalogue_is_what_the_planner_derives() -> None:
    import tables

    message = "the catalogue is out of date: run `make table` and read what changed"
    assert results.read("catalogue").tables == (tables.catalogue(),), message


def test_the_families_are_those_that_are_tried() -> None:
    text = (ROOT / "tests" / "checkpoint" / "test_families.py").read_text(encoding="utf-8")
    for case, kind, *_ in results.read("families").tables[0].rows:
        assert re.search(rf'"{case}": \(\s*{kind.replace("`", chr(34))}', text), f"{case} is no case of the tests"


def test_the_columns_are_those_of_the_scripts() -> None:
    import bench
    import bench_scale
    import figures

    for name, script in (("speed", bench), ("scale", bench_scale), ("figures", figures)):
        assert results.read(name).tables[0].columns == script.HEAD


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_the_zoo_holds_every_class_of_its_transformers() -> None:
    import transformers
    import zoo_models

    found = results.read("zoo")
    if found.made_with["transformers"] != transformers.__version__:
        pytest.skip(f"the zoo was made with transformers {found.made_with['transformers']}")
    ran, missing = (next(t for t in found.tables if t.title.startswith(start)) for start in ("", "Not built"))
    assert sorted(row[0].strip("`") for table in (ran, missing) for row in table.rows) == sorted(zoo_models.classes())


def test_what_a_feature_rests_on_is_shown_by_tests_that_exist() -> None:
    text = "\n".join(f.read_text(encoding="utf-8") for f in (ROOT / "tests").rglob("test_*.py"))
    for feature, _, shown in results.read("rests-on").tables[0].rows:
        names = re.findall(r"`(test_\w+)`", shown)
        assert names, feature
        for name in names:
            assert f"def {name}(" in text, f"{feature}: there is no {name}"
