"""The lowest and the newest packages that the extras allow, and which tests pass with them: `make versions`.

    python tests/figures/versions.py [--venvs FOLDER] [--out FILE] [--only lowest]

Each set of packages gets a virtual environment of its own, which is kept and used again.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUT = Path(__file__).with_name("versions.json")
EXTRAS = ("inplace", "peft")
LOWEST = {"numpy": "1.26.*"}  # that torch 2.6 was built for
TOOLS = ("pytest", "hypothesis", "jsonschema", "accelerate")
SMOKE = (
    "tests/pytorch/test_torch_absorb.py", "tests/pytorch/test_torch_wrappers.py",
    "tests/pytorch/test_torch_restoring.py", "tests/pytorch/test_torch_threads.py",
    "tests/pytorch/test_torch_foreign.py", "tests/pytorch/test_torch_generation.py",
)  # fmt: skip
SHOWN = ("torch", "transformers", "peft", "numpy")


def wanted(which: str) -> list[str]:
    """What pip is asked for: each extra's packages, at their lowest version or as pip chooses."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {re.split(r"[<>=]", line)[0]: line for extra in EXTRAS for line in project["optional-dependencies"][extra]}
    if which == "newest":
        return [*asked.values(), *TOOLS]
    found = {name: re.sub(r">=([\d.]+).*", r"~=\1.0", line) for name, line in asked.items()}
    return [*found.values(), *(f"{name}=={version}" for name, version in LOWEST.items()), *TOOLS]


def built(folder: Path, which: str) -> Path:
    """The environment's Python."""
    python = folder / which / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / which], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted(which), "-e", ROOT], check=True)
    return python


def tried(python: Path, folder: Path) -> dict[str, Any]:
    """The versions, and what the smoke tests say."""
    ask = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {SHOWN}}}))"
    versions = json.loads(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout)
    report = folder / "report.xml"
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *SMOKE]
    subprocess.run([python, *words], cwd=ROOT, check=False)
    suite = next(ET.parse(report).getroot().iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {"versions": versions, **counts, "failed": failed}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--venvs", type=Path, default=ROOT / ".venv-versions")
    options.add_argument("--out", type=Path, default=OUT)
    options.add_argument("--only", choices=("lowest", "newest"))
    given = options.parse_args()
    given.venvs.mkdir(exist_ok=True)
    table = json.loads(given.out.read_text()) if given.out.exists() else {}
    for which in (given.only,) if given.only else ("lowest", "newest"):
        table[which] = tried(built(given.venvs, which), given.venvs)
        given.out.write_text(json.dumps(table, indent=2) + "\n")
        print(which, {k: v for k, v in table[which].items() if k != "failed"}, *table[which]["failed"], sep="\n  ")


if __name__ == "__main__":
    main()
