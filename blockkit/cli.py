"""The command line: `blockkit list | components | check | plan | compare | verify | graph | absorb | ...`.

Results go to stdout, progress and messages to stderr. Exit status: 0 done or yes, 1 a well-formed no,
2 bad input, 130 interrupted.
"""

from __future__ import annotations

import gc
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__, api
from .errors import BadInput, BlockkitError
from .plan import STRATEGIES

if TYPE_CHECKING:
    from .session import Session

DTYPES = ("float32", "float64", "bfloat16")
MOST_SHOWN = 4000  # characters of a message


class Interrupted(BlockkitError):
    """Ctrl-C, by which time every temporary file is gone."""

    exit_status = 130


class Commands(TyperGroup):
    """The commands. What the framework would end in a way of its own ends here as one of our errors."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; nothing was left half-written") from None
        except BrokenPipeError:
            raise
        except OSError as error:
            raise BadInput(str(error)) from None


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

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


def main() -> None:
    """Runs a command; every foreseen failure ends in one message and its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a token
    gc.set_threshold(50_000, 20, 20)  # a large graph is a million objects, nearly all of which live to the end
    try:
        app()
    except BlockkitError as error:
        print(f"error: {printable(str(error), MOST_SHOWN)}", file=sys.stderr)
        sys.exit(error.exit_status)


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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Is a transformer block patchable, by which parameters, and what is the patch?"""
    if version:
        print(f"blockkit {__version__}")
        raise typer.Exit


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """The catalogue of architectures."""
    from .report import catalogue_json, catalogue_text

    entries = catalogue_json()
    show({"architectures": entries}, catalogue_text(entries), as_json)


@app.command()
def components(as_json: AsJson = False) -> None:
    """The components that specs are made of, with their settings."""
    from .handbook import components_json, components_text

    show({"components": components_json()}, components_text(), as_json)


@app.command()
def check(
    spec: SpecArg,
    only: Only = None,
    freeze: Freeze = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that one static patch must serve.")] = None,
    derived: Annotated[bool, typer.Option("--explain", help="Show which rule fired where, for each route.")] = False,
    components: Own = None,
    as_json: AsJson = False,
) -> None:
    """Is it patchable: by which parameters, for how many tokens, and if not, why not, and what would unblock it?"""
    from .report import explanation_json

    found = api.explain(spec, only or (), freeze or (), tokens, _own(components))
    if as_json:
        show(explanation_json(found), "", True)
    else:
        show(None, found.page(derived), False)
    raise typer.Exit(0 if found.verdict.patchable else 1)


@app.command()
def plan(
    spec: SpecArg,
    strategy: Annotated[str, typer.Option(help=f"One of {', '.join(STRATEGIES)}.")] = "stable",
    only: Only = None,
    freeze: Freeze = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that one static patch must serve.")] = None,
    derived: Annotated[bool, typer.Option("--explain", help="Show which rule fired where.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="As a LaTeX document.")] = False,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="As a Mermaid flowchart, the route highlighted.")] = False,
    svg: Annotated[bool, typer.Option("--svg", help="As an SVG drawing, the route highlighted.")] = False,
    components: Own = None,
    as_json: AsJson = False,
) -> None:
    """The patch as numbered assignments, each with its law and where it comes from; or a document or drawing of it."""
    from .report import plan_json, render_plan

    forms = [name for name, on in (("latex", latex), ("mermaid", mermaid), ("svg", svg), ("explain", derived)) if on]
    if len(forms) > 1:
        raise BadInput(f"--{forms[0]} and --{forms[1]} exclude each other; ask for one at a time")
    found = api.plan(spec, strategy, only or (), freeze or (), tokens, _own(components))
    text = render_plan(found, forms[0], spec) if forms else str(found)
    show(plan_json(found) | ({forms[0]: text} if forms else {}), text, as_json)


@app.command()
def compare(
    left: Annotated[str, typer.Argument(metavar="A", help="A spec, as for check.")],
    right: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    only: Only = None,
    freeze: Freeze = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that one static patch must serve.")] = None,
    components: Own = None,
    as_json: AsJson = False,
) -> None:
    """Two designs side by side: patchable or not, for how many tokens, and how many numbers each strategy stores."""
    from .compare import compare as compare_designs
    from .report import comparison_json

    found = compare_designs(left, right, only or (), freeze or (), tokens, _own(components))
    show(comparison_json(found), str(found), as_json)


@app.command()
def verify(
    spec: SpecArg,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    width: Annotated[int | None, typer.Option(help="Of the residual stream, where the spec writes a symbol.")] = None,
    strategy: Annotated[str, typer.Option(help=f"One of {', '.join(STRATEGIES)}.")] = "stable",
    tokens: Annotated[int, typer.Option(help="Tokens that one static patch must serve.")] = 1,
    only: Only = None,
    freeze: Freeze = None,
    block: Annotated[str | None, typer.Option(help="Only this kind of block.")] = None,
    dump: Annotated[Path | None, typer.Option(help="Write all that a recheck needs to this .npz file.")] = None,
    components: Own = None,
    as_json: AsJson = False,
) -> None:
    """Try a patch on small random numbers: solve it, run the edited block, compare."""
    from .report import verification_json
    from .verify import verify as verify_spec
    from .verify import write_dump

    if dump is not None:
        _require_writable(dump, "--dump")
    found = verify_spec(spec, strategy, only or (), freeze or (), tokens, seed, width, block, _own(components))
    if dump is not None and found.worst.result is not None:
        write_dump(found.worst, dump)
        print(f"{found.block}: written to {dump}", file=sys.stderr)
    show(verification_json(found), str(found), as_json)
    raise typer.Exit(0 if found.exact else 1)


@app.command()
def graph(
    spec: SpecArg,
    block: Annotated[str | None, typer.Option(help="This kind of block; by default the first.")] = None,
    components: Own = None,
    as_json: AsJson = False,
) -> None:
    """Write the raw graph of a block, which `check`, `plan` and `verify` read back."""
    from .raw import graph_document

    graphs = api.graphs_by_kind(spec, _own(components))
    if block is not None:
        _require_known("--block", block, graphs)
    document = graph_document(graphs[block] if block is not None else next(iter(graphs.values())))
    show(document, json.dumps(document, indent=2), as_json)


@app.command()
def schema() -> None:
    """The JSON Schema of architecture files."""
    show(None, json.dumps(api.schema(), indent=2), False)


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
    from .report import absorbed_json, absorbed_text
    from .request import MODES

    _require_known("--tokens", tokens, MODES)
    if strategy is not None:
        _require_known("--strategy", strategy, STRATEGIES)
    texts = _text("--context", context), _text("--query", query)
    if out is not None:
        _require_writable(out)
    session = _open_session(model, backend, dtype)
    with progress() as report:
        found = session.absorb(*texts, tokens, strategy, report)
        if out is not None:
            found.patch.save(out)
    result = absorbed_json(found, session.backend, dtype)
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
    from .session import open_checkpoint

    loaded = Patch.load(patch)
    loaded.require_mergeable()
    with progress() as report:
        opened = open_checkpoint(model, report)
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
def export(
    patch: Annotated[Path, typer.Option(help="A patch file that `absorb --out` wrote.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist, or be empty.")],
    format_: Annotated[str, typer.Option("--format", help="peft: a LoRA adapter.")] = "peft",
    model: Annotated[str | None, typer.Option(help="The patch's model, to load the adapter with and compare.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the patch as an adapter that other programs load; with --model, load it back and compare first."""
    from .adapter import FORMATS, export_peft
    from .patch import Patch
    from .report import adapter_json, adapter_text

    _require_known("--format", format_, FORMATS)
    loaded = Patch.load(patch)
    with progress() as report:
        found = export_peft(loaded, out, model, report)
    show(adapter_json(found, loaded), adapter_text(found, loaded), as_json)


@app.command()
def generate(
    model: ModelPath,
    prompt: TextOption,
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to generate at most.")] = 20,
    dtype: Dtype = "float32",
    tokens: Annotated[
        str, typer.Option(help="each: a patch for every token; all: one static patch that grows.")
    ] = "each",
    strategy: StrategyName = None,
    merge: Annotated[bool, typer.Option("--merge", help="Round the changes into the weights.")] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest tokens of this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    metrics: Annotated[Path | None, typer.Option(help="Write all measurements to this .json or .csv file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the errors into this .png, .svg or .pdf file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Generate with the prompt as context, and with the prompt absorbed into the weights, token by token."""
    from . import generation
    from . import generation_report as report_
    from .chance import Chance
    from .weights.extras import require

    _require_known("--dtype", dtype, DTYPES)
    _require_known("--tokens", tokens, generation.MODES)
    if strategy is not None:
        _require_known("--strategy", strategy, STRATEGIES)
    chance = Chance(temperature, top_k, top_p, seed)
    settings = generation.Settings(max_new_tokens, dtype, tokens, strategy, merge, chance)
    text = _text("--prompt", prompt)
    for option, file, kinds in (("--metrics", metrics, report_.METRICS), ("--plot", plot, report_.PLOTS)):
        if file is not None:
            report_.require_suffix(option, file, kinds)
            _require_writable(file, option)
    if plot is not None:
        require("matplotlib")

    with progress() as report:
        run = generation.Run(model, text, settings, report)
        if as_json:
            for number, _ in enumerate(run, 1):
                report("generating", number / max_new_tokens)
    if not as_json:  # without a line of progress, among which they would be torn
        show(None, report_.HEAD, False)
        for step, piece in run:
            show(None, report_.token_line(step, piece), False)
    with progress() as report:
        found = run.finish(report)
    result = report_.generated_json(found)
    if metrics is not None:
        report_.write_metrics(result, metrics)
    if plot is not None:
        report_.write_plot(result, plot)
    show(result, f"\n{found.text}\n\n{report_.generated_text(result)}", as_json)
    raise typer.Exit(0 if found.faithful else 1)


@app.command()
def demo(backend: BackendName = None, as_json: AsJson = False) -> None:
    """The main job on the real Gemma 3 270M, from its package, and a page of results."""
    from .demo import run_demo

    session = _open_session("gemma3-270m", backend, "float32")
    with progress() as report:
        result, text = run_demo(session, report)
    show(result, text, as_json)
    raise typer.Exit(0 if _faithful(result) else 1)


def _open_session(model: str, backend: str | None, dtype: str) -> Session:
    """The model on its backend, after everything has been checked that can be checked without it."""
    from .opening import backends, default_backend
    from .session import Session

    chosen = default_backend() if backend is None else backend
    _require_known("--backend", chosen, backends())
    _require_known("--dtype", dtype, DTYPES)
    _choose_keras_backend(chosen, dtype)
    with progress() as report:
        return Session(model, chosen, dtype, report)


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


def _text(option: str, value: str) -> str:
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


def _require_known(option: str, value: str, allowed: Iterable[str]) -> None:
    """Finds out before the model is loaded."""
    if value not in allowed:
        raise BadInput(f"{option} {value!r} is not known; allowed are {', '.join(allowed)}")


def _own(file: Path | None) -> tuple[Any, ...]:
    """The components that a user's file defines."""
    from .plugins import components_from

    return () if file is None else components_from(file)


def _require_writable(out: Path, option: str = "--out") -> None:
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
