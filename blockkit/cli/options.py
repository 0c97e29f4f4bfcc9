"""The options that commands share, and what is asked of their values before any work is done."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoint.cache import cache_root
from ..errors import BadInput
from ..planner.plan import STRATEGIES

MOST_TEXT = 64 << 20
DTYPES = ("float32", "float64", "bfloat16")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _begin(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """What a shell offers to complete: the words that begin as what was typed."""

    def offered(incomplete: str) -> list[str]:
        return [word for word in words() if word.startswith(incomplete)]

    return offered


def _designs() -> tuple[str, ...]:
    from ..design import catalog

    return tuple(catalog.names())


def _backends() -> tuple[str, ...]:
    from ..absorbing.backends import backends

    return backends()


SpecArg = Annotated[
    str,
    typer.Argument(
        metavar="SPEC", help="Catalogue name, YAML or JSON file, or hf:PATH.", autocompletion=_begin(_designs)
    ),
]
Only = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only these parameters may move.")]
Freeze = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="These parameters may not move.")]
Filter = Annotated[
    str | None, typer.Argument(metavar="FILTER", help="A part of a name or description, or a glob of names.")
]
OneBlock = Annotated[str | None, typer.Option("--block", help="Only this kind of block.")]
_STRATEGY = typer.Option(
    "--strategy", help=f"One of {', '.join(STRATEGIES)}.", autocompletion=_begin(lambda: STRATEGIES)
)
Strategy = Annotated[str, _STRATEGY]
StrategyName = Annotated[str | None, _STRATEGY]
ModelPath = Annotated[
    str,
    typer.Option(
        "--model", help="A .gguf file, a Hugging Face folder, or gemma3-270m.",
        autocompletion=_begin(lambda: ("gemma3-270m",)),
    ),
]  # fmt: skip
BackendName = Annotated[
    str | None,
    typer.Option("--backend", help="numpy, jax, tensorflow or torch.", autocompletion=_begin(_backends)),
]
Dtype = Annotated[str, typer.Option(help="float32, float64 or bfloat16.", autocompletion=_begin(lambda: DTYPES))]
TextOption = Annotated[str, typer.Option(help="The text, @FILE, or - for standard input (@@ for a leading @).")]
Own = Annotated[Path | None, typer.Option("--components", help="A Python file with components of your own.")]


def text_of(option: str, value: str) -> str:
    """The text itself, the content of @FILE, or what stands on standard input (-); @@ is a literal @ in front.

    Raises:
        BadInput: it is empty, not text, too long, or the file cannot be read.
    """
    found, where = value, option
    if value.startswith("@@"):
        found = value[1:]
    elif value == "-" or value.startswith("@"):
        where = f"{option} {value}"
        found = _decoded(_content(value, where), where)
    if any("\ud800" <= c <= "\udfff" for c in found):
        raise BadInput(f"{where} is not text (UTF-8)")
    if option == "--context" and not found.strip():
        raise BadInput(f"{where} is empty: there is nothing to absorb")
    if not found:
        raise BadInput(f"{where} is empty: the patch is made for its tokens")
    return found


def _content(value: str, where: str) -> bytes:
    """What a file or standard input holds, up to the bound."""
    try:
        if value == "-":
            return sys.stdin.buffer.read(MOST_TEXT + 1)
        with Path(value[1:]).expanduser().open("rb") as file:
            return file.read(MOST_TEXT + 1)
    except (OSError, RuntimeError, ValueError, AttributeError) as error:  # ~somebody; a zero byte; no standard input
        raise BadInput(f"{where}: cannot read the file: {getattr(error, 'strerror', None) or error}") from None


def _decoded(content: bytes, where: str) -> str:
    """The text, without the byte order mark that some editors put before it; a line ends as in Python."""
    if len(content) > MOST_TEXT:
        raise BadInput(f"{where}: more than {MOST_TEXT >> 20} MiB, far longer than any model's window")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise BadInput(f"{where}: the file is not text (UTF-8)") from None


def require_one_stdin(*values: str) -> None:
    """Refuses two texts from standard input."""
    if values.count("-") > 1:
        raise BadInput("standard input (-) can be read once only; give the other text in another way")


def files_of(*texts: str) -> list[Path]:
    """The files among texts that may be @FILE."""
    return [Path(t[1:]) for t in texts if t.startswith("@") and not t.startswith("@@")]


def model_files(model: str | None) -> list[Path]:
    """What a model is read from: its file or folder, and what is converted of others."""
    return [] if model is None else [Path(model), cache_root() / "models"]


def spec_files(spec: str) -> list[Path]:
    """What a spec may be read from."""
    return [Path(spec.removeprefix("hf:"))]


def require_output(out: Path, option: str, inputs: Iterable[Path | None]) -> None:
    """Finds out before the work whether a file can be written, and is none of the inputs.

    Raises:
        BadInput: it is an input, no ordinary file, or its folder cannot be written into.
    """
    require_apart(out, option, inputs)
    _require_writable(out, option)


def require_apart(out: Path, option: str, inputs: Iterable[Path | None]) -> None:
    """Refuses an output that is an input, by any name or link, or would lie inside a folder that is one.

    Raises:
        BadInput: it is or does.
    """
    target = _real(out)
    for given in inputs:
        if given is None or (source := _real(given)) is None or target is None or not source.exists():
            continue
        if source.is_dir() and target.is_relative_to(source):
            raise BadInput(f"{option} {out} would lie inside {given}, which is read; choose another place")
        if target.is_file():
            for file in [source, *(source.iterdir() if source.is_dir() else ())]:
                if file.exists() and file.samefile(target):
                    raise BadInput(f"{option} {out} is the same file as {file}, which is read; choose another place")


def _real(path: Path) -> Path | None:
    """The path without links; None for what is no path at all, which others refuse."""
    try:
        return path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError):
        return None


def require_known(option: str, value: str, allowed: Iterable[str]) -> None:
    """Finds out before the model is loaded."""
    if value not in allowed:
        raise BadInput(f"{option} {value!r} is not known; allowed are {', '.join(allowed)}")


def filtered(entries: list[dict[str, Any]], wanted: str | None, keys: Iterable[str]) -> list[dict[str, Any]]:
    """The entries in which the text stands, or whose first key it matches as a glob; case does not matter.

    Raises:
        BadInput: there are none.
    """
    if wanted is None:
        return entries
    name, *_ = keys = tuple(keys)
    text = wanted.casefold()
    found = [
        e for e in entries
        if fnmatchcase(e[name].casefold(), text) or any(text in str(e[key]).casefold() for key in keys)
    ]  # fmt: skip
    if not found:
        raise BadInput(f"{wanted!r:.80} is in no name or description; without a filter, all are listed")
    return found


def own_components(file: Path | None) -> tuple[Any, ...]:
    """The components that a user's file defines."""
    from ..design.plugins import components_from

    return () if file is None else components_from(file)


def _require_writable(out: Path, option: str) -> None:
    """Finds out before the work, not after it."""
    try:
        if out.is_dir():
            raise BadInput(f"{option} {out} is a folder; give a file")
        if out.exists() and not out.is_file():
            raise BadInput(f"{option} {out} is not an ordinary file")
        folder = out.resolve().parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"{option} {out!s:.300}: cannot write into the folder {out.parent!s:.300}: {why}") from None
