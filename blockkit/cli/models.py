"""The commands about real models: absorb a context, write what it becomes, generate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..planner.plan import STRATEGIES
from .options import (
    DTYPES,
    AsJson,
    BackendName,
    Dtype,
    ModelPath,
    StrategyName,
    TextOption,
    files_of,
    model_files,
    require_apart,
    require_known,
    require_one_stdin,
    require_output,
    text_of,
)
from .output import progress, show

if TYPE_CHECKING:
    from ..session import Session


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
    from ..absorbing.request import MODES
    from ..views.report import absorbed_json, absorbed_text

    require_known("--tokens", tokens, MODES)
    if strategy is not None:
        require_known("--strategy", strategy, STRATEGIES)
    require_one_stdin(context, query)
    if out is not None:
        require_output(out, "--out", [*model_files(model), *files_of(context, query)])
    texts = text_of("--context", context), text_of("--query", query)
    session = _open_session(model, backend, dtype)
    with progress() as report:
        found = session.absorb(*texts, tokens, strategy, report)
        if out is not None:
            found.patch.save(out)
    result = absorbed_json(found, session.backend, dtype)
    text = absorbed_text(result) + (f"\npatch written to {out}" if out else "")
    show(result, text, as_json)
    raise typer.Exit(0 if _faithful(result) else 1)


def show_(
    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="A patch file that `absorb --out` wrote.")],
    plot: Annotated[Path | None, typer.Option(help="Draw norms and ranks into this .png, .svg or .pdf file.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a patch file holds: what it was made for, and what it changes in which layer."""
    from ..extras import require
    from ..patch.patch import Patch
    from ..views.generation import PLOTS, require_suffix
    from ..views.patch_plot import write_patch_plot
    from ..views.report import patch_json, patch_text

    if plot is not None:
        require_suffix("--plot", plot, PLOTS)
        require_output(plot, "--plot", [patch])
        require("matplotlib")
    loaded = Patch.load(patch)
    if plot is not None:
        write_patch_plot(loaded, plot)
    show(patch_json(loaded), patch_text(loaded), as_json)


def apply_(
    model: ModelPath,
    patch: Annotated[Path, typer.Option(help="A patch file that `absorb --out` wrote.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist, or be empty.")],
    allow_other_weights: Annotated[
        bool, typer.Option("--allow-other-weights", help="Also into weights it was not made for; proves nothing then.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write an ordinary Hugging Face checkpoint with the patch merged, and run what was written."""
    from ..checkpoint.model import open_checkpoint
    from ..patch.patch import Patch
    from ..views.report import merged_json, merged_text

    loaded = Patch.load(patch)
    loaded.require_mergeable()
    require_apart(out, "--out", [*model_files(model), patch])
    with progress() as report:
        opened = open_checkpoint(model, report)
        report("writing the checkpoint, and running it", 0.0)
        merged = loaded.merge_into(opened, out, allow_other_weights)
    result = merged_json(merged, loaded, out)
    show(result, merged_text(result), as_json)


def export(
    patch: Annotated[Path, typer.Option(help="A patch file that `absorb --out` wrote.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist, or be empty.")],
    format_: Annotated[str, typer.Option("--format", help="peft: a LoRA adapter.")] = "peft",
    model: Annotated[str | None, typer.Option(help="The patch's model, to load the adapter with and compare.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the patch as an adapter that other programs load; with --model, load it back and compare first."""
    from ..patch.patch import Patch
    from ..patch.peft import FORMATS, export_peft
    from ..views.report import adapter_json, adapter_text

    require_known("--format", format_, FORMATS)
    loaded = Patch.load(patch)
    require_apart(out, "--out", [*model_files(model), patch])
    with progress() as report:
        found = export_peft(loaded, out, model, report)
    show(adapter_json(found, loaded), adapter_text(found, loaded), as_json)


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
    out: Annotated[
        Path | None, typer.Option(help="Write the patch to this file: --tokens all the finished one, each the last.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Generate with the prompt as context, and with the prompt absorbed into the weights, token by token."""
    from ..absorbing import generation
    from ..absorbing.sampling import Sampling
    from ..extras import require
    from ..views import generation as report_

    require_known("--dtype", dtype, DTYPES)
    require_known("--tokens", tokens, generation.MODES)
    if strategy is not None:
        require_known("--strategy", strategy, STRATEGIES)
    sampling = Sampling(temperature, top_k, top_p, seed)
    settings = generation.Settings(max_new_tokens, dtype, tokens, strategy, merge, sampling)
    for option, file, kinds in (("--metrics", metrics, report_.METRICS), ("--plot", plot, report_.PLOTS)):
        if file is not None:
            report_.require_suffix(option, file, kinds)
            require_output(file, option, [*model_files(model), *files_of(prompt)])
    if plot is not None:
        require("matplotlib")
    if out is not None:
        require_output(out, "--out", [*model_files(model), *files_of(prompt)])
    text = text_of("--prompt", prompt)

    with progress() as report:
        run = generation.Run.open(model, text, settings, report)
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
    written = ""
    if out is not None:
        run.experiment.patch().save(out)
        result["out"], written = str(out), f"\npatch written to {out}"
    show(result, f"\n{found.text}\n\n{report_.generated_text(result)}{written}", as_json)
    raise typer.Exit(0 if found.faithful else 1)


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
    from ..absorbing.backends import backends, default_backend
    from ..session import Session

    chosen = default_backend() if backend is None else backend
    require_known("--backend", chosen, backends())
    require_known("--dtype", dtype, DTYPES)
    _choose_keras_backend(chosen, dtype)
    with progress() as report:
        return Session(model, chosen, dtype, report)


def _faithful(result: dict[str, Any]) -> bool:
    """Whether the edited model's run is the contextual one, as far as that can be told at all."""
    if result["stored"] is not None:  # changes rounded into 16 bits: the floor of a model that computes in them
        return result["linf"] <= 2 * result["stored"]["floor_linf"]
    rounding = {"float64": 1e-15, "float32": 1e-6}.get(result["dtype"], 1e-2) * result["largest_logit"]
    return result["linf"] <= 10 * max(result["floor_linf"], rounding)


def _choose_keras_backend(backend: str, dtype: str) -> None:
    """Keras and JAX read these once, when they are first imported; only the command line sets them."""
    if backend in ("jax", "tensorflow", "torch"):
        os.environ["KERAS_BACKEND"] = backend
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        if backend == "jax" and dtype == "float64":
            os.environ["JAX_ENABLE_X64"] = "1"
