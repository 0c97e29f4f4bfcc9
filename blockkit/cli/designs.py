"""The commands about designs: no weights, no frameworks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import api
from ..errors import BadInput
from .options import (
    AsJson,
    Filter,
    Freeze,
    OneBlock,
    Only,
    Own,
    SpecArg,
    Strategy,
    filtered,
    own_components,
    require_known,
    require_output,
    spec_files,
)
from .output import printable, show


def list_(filter_: Filter = None, as_json: AsJson = False) -> None:
    """The catalogue of architectures; with FILTER, those whose name, description or source has it."""
    from ..views.report import catalogue_json, catalogue_text

    entries = filtered(catalogue_json(), filter_, ("name", "family", "note", "source"))
    show({"architectures": entries}, catalogue_text(entries), as_json)


def components(filter_: Filter = None, as_json: AsJson = False) -> None:
    """The components that specs are made of, with their settings; with FILTER, those that have it in their entry."""
    from ..design.reference import components_json, components_text

    entries = filtered(components_json(), filter_, ("component", "computes", "settings"))
    show({"components": entries}, components_text(entries), as_json)


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
    from ..views.report import explanation_json

    found = api.explain(spec, only or (), freeze or (), tokens, own_components(components))
    if as_json:
        show(explanation_json(found), "", True)
    else:
        show(None, found.page(derived), False)
    raise typer.Exit(0 if found.verdict.patchable else 1)


def plan(
    spec: SpecArg,
    strategy: Strategy = "stable",
    only: Only = None,
    freeze: Freeze = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that one static patch must serve.")] = None,
    derived: Annotated[bool, typer.Option("--explain", help="Show which rule fired where.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="As a LaTeX document.")] = False,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="As a Mermaid flowchart, the route highlighted.")] = False,
    svg: Annotated[bool, typer.Option("--svg", help="As an SVG drawing, the route highlighted.")] = False,
    block: OneBlock = None,
    components: Own = None,
    as_json: AsJson = False,
) -> None:
    """The patch as numbered assignments, each with its law and where it comes from; or a document or drawing of it.

    Of a model with several kinds of blocks every one is shown; a document or drawing is of one, by default the first.
    """
    from ..views.report import plans_json, render_plan

    forms = [name for name, on in (("latex", latex), ("mermaid", mermaid), ("svg", svg), ("explain", derived)) if on]
    if len(forms) > 1:
        raise BadInput(f"--{forms[0]} and --{forms[1]} exclude each other; ask for one at a time")
    found = api.plan(spec, strategy, only or (), freeze or (), tokens, own_components(components), block=block)
    if forms and not derived and found.others:
        others = ", ".join(kind for plan in found.others for kind in plan.blocks)
        print(f"of the block {'/'.join(found.blocks)}; --block shows another: {others}", file=sys.stderr)
    text = render_plan(found, forms[0], spec) if forms else str(found)
    show(plans_json(found) | ({forms[0]: text} if forms else {}), text, as_json)


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
    from ..comparison import compare as compare_designs
    from ..views.report import comparison_json

    found = compare_designs(left, right, only or (), freeze or (), tokens, own_components(components))
    show(comparison_json(found), str(found), as_json)


def verify(
    spec: SpecArg,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    width: Annotated[int | None, typer.Option(help="Of the residual stream, where the spec writes a symbol.")] = None,
    strategy: Strategy = "stable",
    tokens: Annotated[int, typer.Option(help="Tokens that one static patch must serve.")] = 1,
    only: Only = None,
    freeze: Freeze = None,
    block: OneBlock = None,
    dump: Annotated[Path | None, typer.Option(help="Write all that a recheck needs to this .npz file.")] = None,
    components: Own = None,
    as_json: AsJson = False,
) -> None:
    """Try a patch on small random numbers: solve it, run the edited block, compare."""
    from ..trials.verify import verify as verify_spec
    from ..trials.verify import write_dump
    from ..views.report import verification_json

    if dump is not None:
        require_output(dump, "--dump", [*spec_files(spec), components])
    found = verify_spec(
        spec, strategy, only or (), freeze or (), tokens, seed, width, block, own_components(components)
    )
    if dump is not None and found.worst.result is not None:
        write_dump(found.worst, dump)
        print(printable(f"{found.block}: written to {dump}"), file=sys.stderr)
    show(verification_json(found), str(found), as_json)
    raise typer.Exit(0 if found.exact else 1)


def graph(
    spec: SpecArg,
    block: Annotated[str | None, typer.Option(help="This kind of block; by default the first.")] = None,
    components: Own = None,
    as_json: AsJson = False,
) -> None:
    """Write the raw graph of a block, which `check`, `plan` and `verify` read back."""
    from ..design.raw_graph import graph_document

    graphs = api.graphs_by_kind(spec, own_components(components))
    if block is not None:
        require_known("--block", block, graphs)
    document = graph_document(graphs[block] if block is not None else next(iter(graphs.values())))
    show(document, json.dumps(document, indent=2), as_json)


def schema() -> None:
    """The JSON Schema of architecture files."""
    show(None, json.dumps(api.schema(), indent=2), False)
