"""The public functions: load a spec, ask whether it is patchable, plan the patch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .design import catalog
from .design.architecture import Architecture, Block
from .design.components import Component
from .design.spec import architecture_from, graph_from, read_document, schema
from .errors import BadInput, NotPatchable
from .graph.graph import Globs, Graph
from .graph.sizes import Capacity
from .patch.in_place import backend_of
from .planner.explain import Explanation
from .planner.explain import explain as explain_verdict
from .planner.plan import Plan, make_plan
from .planner.route import Obstruction
from .planner.verdict import Verdict, judge

__all__ = ["check", "explain", "load", "plan", "replace_constants", "schema"]

Spec = str | Path | Architecture | Block | Graph
Judged = Spec | object  # a spec, or a model in memory
Components = Iterable[type[Component]]


def load(spec: Spec, components: Components = ()) -> Architecture | Graph:
    """An architecture or a raw graph.

    Args:
        spec: a catalogue name (`gemma3-270m`), a YAML or JSON file, `hf:PATH` for a Hugging Face
            `config.json` (or its folder), or what `Block`, `Architecture` or `Graph` built.
        components: classes of your own that a file may use beside the kit's components.

    Raises:
        BadInput: unknown, malformed or unsupported; the message says what is allowed.
    """
    if isinstance(spec, Architecture | Graph):
        return spec
    if isinstance(spec, Block):
        return Architecture("block", spec.width, {"block": spec})
    if not isinstance(spec, str | Path):
        raise BadInput(
            f"a {type(spec).__name__} is no spec; give a name, a file, hf:PATH, a Block, an Architecture or a Graph "
            "(a model in memory goes to check, explain or plan)"
        )
    text = str(spec)
    if not text.strip():
        raise BadInput("the spec is empty; give a catalogue name, a YAML or JSON file, or hf:PATH")
    if text in catalog.names():  # whatever the current folder holds
        return catalog.load(text)
    try:
        return _from_path(text, components)
    except OSError as error:
        raise BadInput(f"cannot read {text}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{text} is not text (UTF-8)") from None


def _from_path(text: str, components: Components) -> Architecture | Graph:
    if text.startswith("hf:"):
        from .checkpoint.model import architecture_from_config

        return architecture_from_config(Path(text.removeprefix("hf:")))
    path = Path(text)
    if path.suffix in (".yaml", ".yml", ".json") or (path.exists() and not path.is_dir()):
        document, place = read_document(path)
        if isinstance(document, Mapping) and "graph" in document:
            return graph_from(document["graph"], place.at("graph", document["graph"]))
        return architecture_from(document, place, components)
    if path.is_dir():
        raise BadInput(f"{path} is a folder; for a Hugging Face checkpoint write hf:{path}")
    if len(path.parts) > 1:
        raise BadInput(f"no such file: {path}")
    return catalog.load(text)


def check(
    spec: Judged,
    only: Globs = (),
    freeze: Globs = (),
    tokens: int | None = None,
    components: Components = (),
    example: Any = None,
) -> Verdict:
    """Whether a context can be absorbed, exactly, into the parameters that may move.

    Args:
        spec: what `load` takes, or a model in memory (a `torch.nn.Module`, say).
        only, freeze: globs of parameter names, one or several; only those matched by `only` and not by `freeze` move.
        tokens: how many tokens one static patch must serve; None for whatever the routes can.
        components: see `load`.
        example: what a model in memory is called with, where that cannot be guessed (token ids can).

    Raises:
        BadInput: the spec cannot be read, or a glob matches nothing.
    """
    graphs = distinct_graphs(spec, only, freeze, components, example)
    return joint_verdict({kinds: judge(graph, require_positive(tokens)) for kinds, graph in graphs.items()})


def explain(
    spec: Judged,
    only: Globs = (),
    freeze: Globs = (),
    tokens: int | None = None,
    components: Components = (),
    example: Any = None,
) -> Explanation:
    """The verdict of `check` with its reasons: every route's derivation, and what would unblock a no.

    Raises:
        BadInput: the spec cannot be read, or a glob matches nothing.
    """
    graphs = distinct_graphs(spec, only, freeze, components, example)
    verdicts = {kinds: judge(graph, require_positive(tokens)) for kinds, graph in graphs.items()}
    blocked = {"/".join(kinds): g for kinds, g in graphs.items() if not verdicts[kinds].patchable}
    return explain_verdict(next(iter(graphs.values())), joint_verdict(verdicts), blocked, tokens)


def plan(
    spec: Judged,
    strategy: str = "stable",
    only: Globs = (),
    freeze: Globs = (),
    tokens: int | None = None,
    components: Components = (),
    example: Any = None,
    block: str | None = None,
) -> Plan:
    """The plan of a strategy for the block; of a model's several kinds of blocks, the first with the `others`.

    Args:
        block: only this kind of block.

    Raises:
        BadInput: the spec cannot be read, an unknown strategy or kind, or a glob that matches nothing.
        NotPatchable: the strategy has no route; the message says which have, and for which kind of block.
    """
    graphs = distinct_graphs(spec, only, freeze, components, example)
    known = [kind for kinds in graphs for kind in kinds]
    if block is not None and block not in known:
        raise BadInput(f"there is no kind of block {block!r:.80}; there are {', '.join(known)}")
    wanted = {kinds: g for kinds, g in graphs.items() if block is None or block in kinds}
    plans = []
    for kinds, graph in wanted.items():
        try:
            plans.append(replace(make_plan(graph, strategy, require_positive(tokens)), blocks=kinds))
        except NotPatchable as error:
            raise NotPatchable(f"{'/'.join(kinds)}: {error}" if len(graphs) > 1 else str(error)) from None
    return replace(plans[0], others=tuple(plans[1:]))


def replace_constants(architecture: Architecture, constants: Mapping[str, Any]) -> Architecture:
    """The architecture with more of its symbols given numbers."""
    return replace(architecture, constants={**architecture.constants, **constants})


def require_positive(tokens: int | None) -> int | None:
    """The number of tokens, if there is one and it can be served."""
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise BadInput(f"tokens must be at least 1, got {tokens!r:.60}")
    return tokens


def graphs_by_kind(spec: Judged, components: Components = (), example: Any = None) -> Mapping[str, Graph]:
    """The graph of every kind of block, in the order of the spec; a raw graph is of the kind `graph`."""
    if not isinstance(spec, Spec):
        return backend_of(spec).graphs(spec, example)
    if example is not None:
        raise BadInput("an example is what a model in memory is called with; a spec needs none")
    loaded = load(spec, components)
    if isinstance(loaded, Graph):
        return {"graph": loaded}
    try:
        return loaded.graphs
    except BadInput as error:
        raise said_of(spec, error) from None


def said_of(spec: Spec, error: BadInput) -> BadInput:
    """The error with the name of the spec, unless its place already begins with that."""
    if not isinstance(spec, str | Path) or str(error).startswith(str(spec)):
        return error
    return BadInput(f"{spec}: {error}")


def distinct_graphs(
    spec: Judged,
    only: Globs = (),
    freeze: Globs = (),
    components: Components = (),
    example: Any = None,
) -> dict[tuple[str, ...], Graph]:
    """The graphs that differ for the planner, with the kinds of blocks that share each."""
    found: dict[Any, tuple[list[str], Graph]] = {}
    for kind, graph in graphs_by_kind(spec, components, example).items():
        found.setdefault(_planning_key(graph), ([], graph))[0].append(kind)
    return {tuple(kinds): graph.restricted(only, freeze) for kinds, graph in found.values()}


def _planning_key(graph: Graph) -> Any:
    """What the planner sees of a graph: the settings inside mixing nodes play no part."""
    nodes = tuple((n.name, n.op.kind if n.op.mixing else n.op, n.args) for n in graph.nodes)
    return graph.input, graph.output, graph.width, graph.parameters, nodes


def joint_verdict(verdicts: dict[tuple[str, ...], Verdict]) -> Verdict:
    """One verdict for a model of several kinds of blocks: as good as the worst of them."""
    if len(verdicts) == 1:
        return next(iter(verdicts.values()))
    answers = [v.patchable for v in verdicts.values()]
    patchable = False if False in answers else None if None in answers else True
    capacity = Capacity()
    for v in verdicts.values():
        capacity = capacity & v.capacity
    common = [r for r in next(iter(verdicts.values())).routes if all(r in v.routes for v in verdicts.values())]
    reasons = [
        Obstruction(o.node, f"{'/'.join(kinds)}: {o.reason}") for kinds, v in verdicts.items() for o in v.obstructions
    ]
    return Verdict(patchable, capacity, tuple(common), tuple(reasons))
