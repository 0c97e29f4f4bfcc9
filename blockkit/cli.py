"""The command line: `blockkit list | check | plan | absorb | apply | demo | schema`.

Results go to stdout, progress and messages to stderr. Exit status: 0 done or yes, 1 a well-formed no,
2 bad input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from . import __version__, api
from .errors import BadInput, BlockkitError
from .plan import STRATEGIES

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
SpecArg = Annotated[str, typer.Argument(metavar="SPEC", help="Catalogue name, YAML or JSON file, or hf:PATH.")]
Only = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only these parameters may move.")]
Freeze = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="These parameters may not move.")]
StrategyName = Annotated[str | None, typer.Option("--strategy", help=f"One of {', '.join(STRATEGIES)}.")]
ModelPath = Annotated[str, typer.Option("--model", help="A .gguf file, a Hugging Face folder, or gemma3-270m.")]
BackendName = Annotated[str | None, typer.Option("--backend", help="numpy, jax, tensorflow or torch.")]
Dtype = Annotated[str, typer.Option(help="float32, float64 or bfloat16.")]
TextOption = Annotated[str, typer.Option(help="The text, or @FILE.")]


def main() -> None:
    """Runs a command; every foreseen failure ends in one message and its exit status."""
    try:
        app()
    except BlockkitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("interrupted; nothing was left half-written", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def show(result: Any, text: str, as_json: bool) -> None:
    print(json.dumps(result) if as_json else text)


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Is a transformer block patchable, by which parameters, and what is the patch?"""
    if version:
        print(f"blockkit {__version__}")
        raise typer.Exit


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """The catalogue of architectures."""
    from .report import catalogue_json

    entries = catalogue_json()
    width = max(len(e["name"]) for e in entries)
    text = "\n".join(f"{e['name']:<{width}}  {e['note']}  ({e['source']})" for e in entries)
    show({"architectures": entries}, text, as_json)


@app.command()
def check(
    spec: SpecArg,
    only: Only = None,
    freeze: Freeze = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that one static patch must serve.")] = None,
    as_json: AsJson = False,
) -> None:
    """Is it patchable: by which parameters, for how many tokens, and if not, why not?"""
    from .report import verdict_json

    verdict = api.check(spec, only or (), freeze or (), tokens)
    show(verdict_json(verdict), str(verdict), as_json)
    raise typer.Exit(0 if verdict.patchable else 1)


@app.command()
def plan(
    spec: SpecArg,
    strategy: StrategyName = "stable",
    only: Only = None,
    freeze: Freeze = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that one static patch must serve.")] = None,
    as_json: AsJson = False,
) -> None:
    """The patch as numbered assignments, each with its law and where it comes from."""
    from .report import plan_json

    found = api.plan(spec, strategy or "stable", only or (), freeze or (), tokens)
    show(plan_json(found), str(found), as_json)


@app.command()
def schema() -> None:
    """The JSON Schema of architecture files."""
    print(json.dumps(api.schema(), indent=2))


@app.command()
def absorb(
    model: ModelPath,
    context: TextOption,
    query: TextOption,
    backend: BackendName = None,
    strategy: StrategyName = None,
    dtype: Dtype = "float32",
    tokens: Annotated[str, typer.Option(help="last, each or all: for which tokens of the query it is exact.")] = "last",
    out: Annotated[Path | None, typer.Option(help="Write the patch to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Absorb a context into the weights of a real model, and prove it by a run of the edited model."""
    from .report import absorbed_text

    if out is not None:
        _require_writable(out)
    session = Session(model, backend, dtype)
    result, _ = session.absorb(_text(context), _text(query), tokens, strategy, out)
    text = absorbed_text(result) + (f"\npatch written to {out}" if out else "")
    show(result, text, as_json)
    raise typer.Exit(0 if _faithful(result) else 1)


@app.command("apply")
def apply_(
    model: ModelPath,
    patch: Annotated[Path, typer.Option(help="A patch file that `absorb --out` wrote.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist, or be empty.")],
    as_json: AsJson = False,
) -> None:
    """Write an ordinary Hugging Face checkpoint with the patch merged."""
    from .patch import Patch

    loaded = Patch.load(patch)
    with progress() as report:
        opened = _open(model, report)
        report("writing the checkpoint", 0.0)
        loaded.merge_into(opened, out)
    first = loaded.context_length
    result = {
        "out": str(out),
        "changed": sorted(loaded.changes),
        "validity": loaded.validity,
        "position_ids": [int(p) for p in loaded.position_ids[0]],
    }
    text = (
        f"wrote {out} with {len(loaded.changes)} changed weights; {loaded.validity}\n"
        f"run it on the query alone, with position_ids from {first} to {first + len(loaded.query) - 1}"
    )
    show(result, text, as_json)


@app.command()
def demo(backend: BackendName = None, as_json: AsJson = False) -> None:
    """The main job on the real Gemma 3 270M, from its package, and a page of results."""
    from .demo import run_demo

    result, text = run_demo(Session("gemma3-270m", backend, "float32"))
    show(result, text, as_json)
    raise typer.Exit(0 if _faithful(result) else 1)


class Session:
    """A model on a backend, with its tokenizer, for one command."""

    def __init__(self, model: str, backend: str | None, dtype: str) -> None:
        from .opening import default_backend, open_executor
        from .weights.tokenizer import load_tokenizer

        self.backend, self.dtype = backend or default_backend(), dtype
        _choose_keras_backend(self.backend, dtype)
        with progress() as report:
            start = time.perf_counter()
            self.model = _open(model, report)
            self.tokenizer = load_tokenizer(self.model.folder.path)
            report(f"loading the weights ({self.backend}, {dtype})", 0.0)
            self.executor = open_executor(self.model, self.backend, dtype)
            self.seconds = {"load": time.perf_counter() - start}

    def absorb(
        self, context: str, query: str, tokens: str, strategy: str | None, out: Path | None = None
    ) -> tuple[dict[str, Any], Any]:
        """Algorithm 1, measured; gives the JSON result and the pair (absorbed, reference)."""
        from . import algorithm
        from .measure import measure
        from .patch import Patch
        from .report import absorbed_json
        from .request import Request

        ids = self.tokenizer.encode(context, special=True), self.tokenizer.encode(query, special=False)
        if not context.strip():
            raise BadInput("--context is empty: there is nothing to absorb")
        request = Request(np.array(ids[0], int), np.array(ids[1], int), tokens)
        with progress() as report:
            absorbed = algorithm.absorb(self.executor, request, strategy, report)
            start = time.perf_counter()
            report("measuring the unpatched model and the recompute floor", 0.0)
            reference = measure(self.executor, absorbed)
            spent = {**self.seconds, **absorbed.seconds, "measure": time.perf_counter() - start}
            if out is not None:
                Patch.of(absorbed, self.model, self.dtype).save(out)
        return absorbed_json(absorbed, reference, self.backend, self.dtype, spent), (absorbed, reference)


def _faithful(result: dict[str, Any]) -> bool:
    """Whether the edited model's run is the contextual one, as far as that can be told at all."""
    rounding = {"float64": 1e-15, "float32": 1e-6}.get(result["dtype"], 1e-2) * result["largest_logit"]
    return result["linf"] <= 10 * max(result["floor_linf"], rounding)


def _choose_keras_backend(backend: str, dtype: str) -> None:
    """Keras and JAX read these once, when they are first imported; only the command line sets them."""
    if backend in ("jax", "tensorflow", "torch"):
        os.environ["KERAS_BACKEND"] = backend
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        if backend == "jax" and dtype == "float64":
            os.environ["JAX_ENABLE_X64"] = "1"


def _open(model: str, report: Any) -> Any:
    from .checkpoint import open_model
    from .weights.cache import resolve_model

    return open_model(resolve_model(model, report))


def _text(value: str) -> str:
    """The text itself, or the content of @FILE."""
    if not value.startswith("@"):
        return value
    path = Path(value[1:])
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not text (UTF-8)") from None


def _require_writable(out: Path) -> None:
    """Finds out before the work, not after it."""
    if out.is_dir():
        raise BadInput(f"--out {out} is a folder; give a file")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise BadInput(f"--out {out}: the folder {out.parent} does not exist or cannot be written")


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
                print(stage, file=sys.stderr, flush=True)
            seen = stage
            bar.update(task, description=stage, completed=fraction)

        yield report
