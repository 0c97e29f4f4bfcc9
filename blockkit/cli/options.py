"""The options that commands share, and what is asked of their values before any work is done."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BadInput
from ..planner.plan import STRATEGIES

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
StrategyName = Annotated[
    str | None,
    typer.Option("--strategy", help=f"One of {', '.join(STRATEGIES)}.", autocompletion=_begin(lambda: STRATEGIES)),
]
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
TextOption = Annotated[str, typer.Option(help="The text, or @FILE.")]
Own = Annotated[Path | None, typer.Option("--components", help="A Python file with components of your own.")]


def text_of(option: str, value: str) -> str:
    """The text itself, or the content of @FILE.

    Raises:
        BadInput: it is empty, not text, or the file cannot be read.
    """
    found, where = value, option
    if value.startswith("@"):
        where = f"{option} {value}"
        try:
            found = Path(value[1:]).expanduser().read_text(encoding="utf-8")
        except (OSError, RuntimeError) as error:
            raise BadInput(f"{where}: cannot read the file: {getattr(error, 'strerror', None) or error}") from None
        except ValueError:
            raise BadInput(f"{where}: the file is not text (UTF-8)") from None
    if any("\ud800" <= c <= "\udfff" for c in found):
        raise BadInput(f"{where} is not text (UTF-8)")
    if option == "--context" and not found.strip():
        raise BadInput(f"{where} is empty: there is nothing to absorb")
    if not found:
        raise BadInput(f"{where} is empty: the patch is made for its tokens")
    return found


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


def require_writable(out: Path, option: str = "--out") -> None:
    """Finds out before the work, not after it."""
    if out.is_dir():
        raise BadInput(f"{option} {out} is a folder; give a file")
    if out.exists() and not out.is_file():
        raise BadInput(f"{option} {out} is not an ordinary file")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        why = error.strerror or error
        raise BadInput(f"{option} {out}: cannot write into the folder {out.parent}: {why}") from None
