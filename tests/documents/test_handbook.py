"""The handbook is built without a warning, from nothing that lies elsewhere, and leaves nothing out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

from blockkit.design.raw_graph import OPS
from blockkit.graph.ops import FUNCTIONS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built handbook."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(EXAMPLES / "mkdocs.yml"), "-d", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr
    return out


def test_there_are_at_least_twelve_pages_in_four_parts(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= 12
    assert {"tutorials", "how-to", "explanation", "reference", "results"} <= {p.parent.name for p in pages}


class Loaded(HTMLParser):
    """What a browser fetches for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        source = named.get("src") if tag in ("script", "img", "iframe", "source") else None
        fetched = tag == "link" and (named.get("rel") or "") in ("stylesheet", "preload", "preconnect", "icon")
        self.found += [url for url in (source, named.get("href") if fetched else None) if url]


def loaded(page: Path) -> Iterator[str]:
    parser = Loaded()
    parser.feed(page.read_text(encoding="utf-8"))
    yield from parser.found


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not [url for url in loaded(page) if re.match(r"(https?:)?//", url)], page


def test_the_law_table_has_every_operation_and_activation(site: Path) -> None:
    text = (site / "reference" / "laws.html").read_text(encoding="utf-8")
    for kind in OPS:
        assert f"<code>{kind}</code>" in text, f"{kind} is not in the table of the laws"
    for fn in FUNCTIONS:
        assert f"<code>activation</code>: {fn}</td>" in text


def test_no_macro_is_left_unrendered(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert "{{ " not in page.read_text(encoding="utf-8"), page
