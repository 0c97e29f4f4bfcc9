"""Every architecture of the catalogue at small size: judged, planned with every strategy it admits, and carried out."""

from collections import Counter
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest

from blockkit.design import catalog
from blockkit.graph.graph import Graph
from blockkit.graph.sizes import Size
from blockkit.planner.plan import make_plan, offers
from blockkit.planner.planner import Planner
from blockkit.planner.verdict import judge
from blockkit.trials.sequence import draw_sequence
from blockkit.trials.trial import solve

LIMIT, SEEN = 1e-9, 1e-3  # relative: a patched block's error at most, an unpatched one's at least
QUERY = 3
SMALL: dict[str, Any] = {
    # widths
    "d_model": 16, "d_ff": 24, "d_tokens": 10, "inner": 20, "state": 5, "dt_rank": 3,
    # experts
    "experts": 4, "top_k": 2, "shared": 12, "d_dense": 20, "groups": 2, "top_groups": 1,
    # heads
    "heads": 4, "kv_heads": 2, "head_dim": 4, "value_dim": 6, "scale_dim": 4, "rope_dim": 2,
    "q_rank": 7, "kv_rank": 6, "nope_dim": 4,
    # along the sequence: wider than the sequences here, so that the context is seen
    "context_length": 64, "window": 32, "length": 24, "places": 12, "kernel": 4,
    # whole models
    "layers": 2, "vocabulary": 50, "tied": True, "embedding_scale": 4.0,
    # numbers
    "eps": 1e-6, "rope_base": 1e4, "local_rope_base": 1e4, "global_rope_base": 1e6, "rope_scaling": 1.0,
    "attention_scale": 0.5, "residual_scale": 0.3, "logit_scale": 0.5, "unit": 0.25,
}  # fmt: skip
NOT_PATCHABLE = {"albert", "universal-transformer"}  # one set of weights for all layers


def numbers(entry: catalog.Entry) -> dict[str, Any]:
    """A small number for every symbol of a family."""
    used = {key for variant in entry.variants.values() for key in variant if "." not in key}
    used |= {s for graph in entry.architecture.graphs.values() for s in symbols(graph)}
    unknown = ", ".join(sorted(used - SMALL.keys() - entry.architecture.constants.keys()))
    assert not unknown, f"{entry.family} uses {unknown}: give each a small number in SMALL (tests/test_catalogue.py)"
    return {name: SMALL[name] for name in used if name in SMALL}


def designs(entry: catalog.Entry) -> dict[str, dict[str, Any]]:
    """The settings beside numbers in which variants differ from the general design, by variant."""
    found: dict[str, dict[str, Any]] = {"": {}}
    for name, variant in entry.variants.items():
        settings = {key: value for key, value in variant.items() if "." in key}
        if settings not in found.values():
            found[name] = settings
    return found


def blocks(family: str) -> dict[str, Graph]:
    """Every block of a family at small size, those of all its designs, each once."""
    entry = catalog.entry(family)
    found: dict[str, Graph] = {}
    for name, settings in designs(entry).items():
        for kind, graph in entry.bound({**numbers(entry), **settings}, family).graphs.items():
            if graph not in found.values():
                found[f"{name} {kind}".strip()] = graph
    return found


def symbols(value: Any) -> set[str]:
    """The symbols in the shapes and settings of a graph."""
    if isinstance(value, Size):
        return set(value.symbols)
    if is_dataclass(value) and not isinstance(value, type):
        return {s for f in fields(value) for s in symbols(getattr(value, f.name))}
    if isinstance(value, tuple | list):
        return {s for v in value for s in symbols(v)}
    return {s for v in value.values() for s in symbols(v)} if isinstance(value, dict) else set()


def attempts(graph: Graph, strategy: str) -> dict[str, Any]:
    """The plan carried out for the last token of a query, for each by itself, and for all if it can serve them."""
    plan = make_plan(graph, strategy)
    found = {
        "last": solve(draw_sequence(graph, 1, query=QUERY, tokens=1), plan),
        "each": solve(draw_sequence(graph, 1, query=QUERY), plan, per_token=True),
    }
    if plan.route.capacity.serves(QUERY):
        found["all"] = solve(draw_sequence(graph, 1, query=QUERY), plan)
    return found


@pytest.mark.parametrize("family", catalog.families())
def test_every_plan_is_exact(family: str) -> None:
    worst: list[float] = []
    for kind, graph in blocks(family).items():
        verdict, strategies = judge(graph, None), offers(Planner(graph))
        assert bool(strategies) is (family not in NOT_PATCHABLE), kind
        assert (verdict.patchable is False) is (family in NOT_PATCHABLE), kind
        for strategy in strategies:
            for tokens, result in attempts(graph, strategy).items():
                assert result.relative_linf <= LIMIT, (kind, strategy, tokens)
                assert result.unpatched_relative >= SEEN, (kind, strategy, tokens)
                worst.append(result.relative_linf)
    print(f"\n{family}: {len(worst)} patched runs, worst relative error {max(worst, default=0):.1e}")


@pytest.mark.parametrize("family", catalog.families())
def test_judged_with_symbols_and_at_every_published_size(family: str) -> None:
    """The answer is a property of the design; a size can only settle what symbols leave open."""
    entry = catalog.entry(family)
    for name, variant in entry.variants.items():
        settings = {key: value for key, value in variant.items() if "." in key}
        general = entry.bound(settings, family).graphs
        for kind, graph in catalog.load(f"{family}-{name}").graphs.items():
            assert not symbols(graph), f"{name}: sizes without a number"
            answer, before = judge(graph, None).patchable, judge(general[kind], None).patchable
            assert answer is before or before is None, name


def test_there_are_many_and_each_says_where_it_is_from_and_what_is_special() -> None:
    assert len(catalog.names()) >= 40
    entries = {family: catalog.entry(family).architecture for family in catalog.families()}
    assert not [family for family, a in entries.items() if not (a.source.strip() and a.note.strip())]
    notes = Counter(a.note for a in entries.values())
    assert max(notes.values()) == 1, notes.most_common(1)


def test_a_symbol_without_a_small_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(SMALL, "d_ff")
    with pytest.raises(AssertionError, match="llama uses d_ff: give each a small number"):
        blocks("llama")


def test_a_wrong_patch_is_seen() -> None:
    """The error is that of a run of the edited block: another context's patch does not pass."""
    graph = blocks("llama")["block"]
    plan = make_plan(graph, "minimal")
    first, second = (draw_sequence(graph, seed, query=QUERY, tokens=1) for seed in (1, 2))
    result = solve(first, plan)
    wanted = second.rows(True, (graph.output,), second.parameters, slice(None))[graph.output]
    changed = {**second.parameters, **{name: result.patched_parameters[name] for name in result.changes}}
    found = second.rows(False, (graph.output,), changed, slice(None))[graph.output]
    assert np.abs(found - wanted).max() / np.abs(wanted).max() > SEEN
