"""The command line: `blockkit list | components | check | plan | compare | verify | graph | absorb | show | ...`.

Results go to stdout, progress and messages to stderr. Exit status: 0 done or yes, 1 a well-formed no,
2 bad input, 70 a fault of blockkit's own, 130 interrupted.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import BadInput, BlockkitError
from . import designs, models
from .interrupted import Interrupted
from .output import printable

MOST_SHOWN = 4000  # characters of a message


class Commands(TyperGroup):
    """The commands. What the framework would end in a way of its own ends here as one of our errors."""

    def make_context(self, *args: Any, **settings: Any) -> Any:
        """Takes the words of the command apart."""
        try:
            return super().make_context(*args, **settings)
        except KeyboardInterrupt:
            raise Interrupted from None

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None
        except BrokenPipeError:
            raise
        except OSError as error:
            raise BadInput(str(error)) from None


app = typer.Typer(
    cls=Commands,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def run() -> None:
    """Runs a command; every failure that was foreseen ends in one message and its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # half a character is written as an escape
            chosen = stream.encoding if "PYTHONIOENCODING" in os.environ else "utf-8"  # whatever the locale
            stream.reconfigure(encoding=chosen, errors="backslashreplace")
    gc.set_threshold(50_000, 20, 20)  # a large graph is a million objects, nearly all of which live to the end
    try:
        app()
    except BlockkitError as error:
        _end(str(error), error.exit_status)


def _end(message: str, status: int) -> None:
    print(f"error: {printable(message, MOST_SHOWN)}", file=sys.stderr)
    sys.exit(status)


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Is a transformer block patchable, by which parameters, and what is the patch?"""
    if version:
        print(f"blockkit {__version__}")
        raise typer.Exit


for command in (
    designs.list_, designs.components, designs.check, designs.plan, designs.compare, designs.verify, designs.graph,
    designs.schema, models.absorb, models.show_, models.apply_, models.export, models.generate, models.demo,
):  # fmt: skip
    app.command(command.__name__.rstrip("_"))(command)
