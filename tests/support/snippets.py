"""The fenced blocks of a page, run in order as a reader would.

python tests/support/snippets.py PAGE       runs them in the current folder

Python blocks share one namespace. Of `sh` blocks every command runs by itself and must end with status 0, or with the
one that its comment names (`# exit status 1`). A block with a `title="FILE"` is written to that file first. `console`
blocks are for what a test cannot run (installing, long work): only their commands are looked at.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from markdown_it import MarkdownIt

STATUS = re.compile(r"#.*\bexit status (\d+)")
TITLE = re.compile(r'title="([\w.-]+)"')
TOLD = {"python", "sh", "console", "text", "yaml", "json", ""}  # what a block may say it is


@dataclass(frozen=True)
class Snippet:
    """A fenced block: what it says it is, its text, and the line where that begins."""

    language: str
    title: str
    text: str
    line: int


def snippets(page: Path) -> Iterator[Snippet]:
    """All fenced blocks of a page, in order."""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.map:
            title = TITLE.search(token.info)
            language = token.info.split()[0] if token.info.strip() else ""
            yield Snippet(language, title[1] if title else "", token.content, token.map[0] + 1)


def commands(snippet: Snippet) -> Iterator[str]:
    """The commands of a shell block; a line may go on after a backslash."""
    for line in snippet.text.replace("\\\n", " ").splitlines():
        text = line.removeprefix("$ ").strip()
        if text and not text.startswith("#"):
            yield text


def run(page: Path) -> None:
    """Runs the blocks of a page in the current folder; the first failure ends it."""
    module = sys.modules["__page__"] = ModuleType("__page__")  # dataclasses look their module up
    for snippet in snippets(page):
        where = f"{page}, line {snippet.line}"
        if snippet.title:
            Path(snippet.title).write_text(snippet.text, encoding="utf-8")
        if snippet.language == "python":
            lines = "\n" * snippet.line + snippet.text  # so that a traceback shows the page's own lines
            exec(compile(lines, str(page), "exec"), vars(module))
        if snippet.language == "sh":
            for command in commands(snippet):
                status = STATUS.search(command)
                done = subprocess.run(["bash", "-c", command], stdin=subprocess.DEVNULL)
                if done.returncode != int(status[1] if status else 0):
                    raise SystemExit(f"{where}: exit status {done.returncode} of: {command}")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
