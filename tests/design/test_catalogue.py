"""Every architecture of the catalogue at small size: judged, planned with every strategy it admits, and carried out."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from small_blocks import SMALL, blocks, symbols

from blockkit.design import catalog
from blockkit.graph.graph import Graph
from blockkit.planner.plan import make_plan, offers
from blockkit.planner.routes import Planner
from blockkit.planner.verdict import judge
from blockkit.trials.sequence import draw_sequence
from blockkit.trials.trial import solve

LIMIT, SEEN = 1e-9, 1e-3  # relative: a patched block's error at most, an unpatched one's at least
QUERY = 3
NOT_PATCHABLE = {"albert", "universal-transformer"}  # one set of weights for all layers


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
