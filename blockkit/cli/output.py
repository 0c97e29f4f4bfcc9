"""What the command line prints: results on stdout, progress on stderr, nothing that could control a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import BadInput


def printable(text: str, most: int | None = None) -> str:
    """Text for a terminal: what could control it is written as an escape, the middle of a long text left out."""
    if most is not None and len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def show(result: Any, text: str, as_json: bool) -> None:
    """Prints the result; a reader that has seen enough, as `head` has, is no error."""
    try:
        print(json.dumps(result) if as_json else printable(text), flush=True)
    except BrokenPipeError:
        _close_stdout()
    except OSError as error:  # as where the disk is full
        _close_stdout()
        raise BadInput(f"cannot write the result: {error.strerror or error}") from None


def _close_stdout() -> None:
    """Nothing more is written there, not even what is still held back for it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def progress() -> Iterator[Any]:
    """A progress line on stderr, where stderr is a terminal; else a line for each stage."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        seen = ""

        def report(stage: str, fraction: float) -> None:
            nonlocal seen
            if stage != seen and not console.is_terminal:
                print(printable(stage), file=sys.stderr, flush=True)
            seen = stage
            bar.update(task, description=stage, completed=fraction)

        yield report
