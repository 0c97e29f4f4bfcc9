"""The options that commands share, and what is asked of their values before any work is done."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BadInput
from ..planner.plan import STRATEGIES

DTYPES = ("float32", "float64", "bfloat16")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
SpecArg = Annotated[str, typer.Argument(metavar="SPEC", help="Catalogue name, YAML or JSON file, or hf:PATH.")]
Only = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only these parameters may move.")]
Freeze = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="These parameters may not move.")]
StrategyName = Annotated[str | None, typer.Option("--strategy", help=f"One of {', '.join(STRATEGIES)}.")]
ModelPath = Annotated[str, typer.Option("--model", help="A .gguf file, a Hugging Face folder, or gemma3-270m.")]
BackendName = Annotated[str | None, typer.Option("--backend", help="numpy, jax, tensorflow or torch.")]
Dtype = Annotated[str, typer.Option(help="float32, float64 or bfloat16.")]
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
