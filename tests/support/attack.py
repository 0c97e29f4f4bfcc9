"""What is asked of every verdict: a yes is carried out, a no is attacked, an unknown is looked into.

Each design comes back as a `Record`; `test_attack.py` asserts on records, `attack_figures.py` counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from designs import seeded
from solver import Attack, Instance

from blockkit.design.spec import Place, graph_from
from blockkit.errors import ConditionViolated
from blockkit.graph.graph import Graph
from blockkit.graph.laws import Kind
from blockkit.planner.plan import Plan, offers
from blockkit.planner.routes import Planner, Route
from blockkit.planner.verdict import Verdict, judge
from blockkit.trials import trial

EXACT = 1e-9  # the relative L-inf error that a yes promises in float64
FAILED = 1e-6  # a solver that stays above has not reproduced the block
LOUDNESS = (1.0, 4.0, 30.0, 200.0)  # how much larger the context is than in the reduced run
AGAIN = 12  # further draws that are asked about a refused one
SLACK = 64.0  # an error within so many times what storing the patch in float64 does is the draw's, not the plan's
STEEP = 1e6  # a condition number from which on float64 cannot promise 1e-9
MOST_TOKENS = 8
MOST_UNKNOWN = 0.06  # of the designs, for other reasons than an opaque operation
MOST_ASIDE = 0.005  # of the plans that are carried out, but for those with an open condition
OPAQUE = "a free parameter upstream of a mixing node, which is opaque"
OUTCOMES = ("every context solved", "some solved", "none solved")
PIECEWISE = ("relu", "leaky_relu", "clamp", "top_k")


@dataclass
class Record:
    """What was found about one design.

    Attributes:
        answer: `yes`, `no`, `open`, `size` or `unknown`.
        runs: plans carried out.
        aside: runs that say nothing about the plan, by cause (see `excuse`).
        worst: the worst relative L-inf error of the others.
        faults: plans that a yes promised and that were not exact, in words.
        reached: for an attacked answer, the least error by context; `solved` if all are reproduced.
        why: for an unknown, the kind of its cause (see `cause`).
    """

    document: Mapping[str, Any]
    answer: str
    runs: int = 0
    aside: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0
    faults: list[str] = field(default_factory=list)
    reached: tuple[float, ...] = ()
    why: str = ""

    @property
    def solved(self) -> bool:
        return bool(self.reached) and max(self.reached) <= FAILED

    @property
    def outcome(self) -> str:
        """What the solver made of it: one of `OUTCOMES`."""
        return OUTCOMES[0 if self.solved else 1 if min(self.reached) <= FAILED else 2]

    @property
    def wrong(self) -> bool:
        """Whether the answer is refuted: a yes by a plan that fails, a no by a solver that does not."""
        return bool(self.faults) or (self.answer == "no" and self.solved)


def lowered(document: Mapping[str, Any]) -> Graph:
    return graph_from(document["graph"], Place("design"))


def answer_of(verdict: Verdict) -> str:
    if verdict.patchable is not None:
        return "yes" if verdict.patchable else "no"
    kinds = {c.kind for r in verdict.routes for c in r.conditions}
    return "open" if Kind.OPEN in kinds else "size" if Kind.SIZE in kinds else "unknown"


CAUSES = {
    "fill a subspace": "a subspace, which other ways may complete",
    "one part of a concatenation": "a subspace, which other ways may complete",
    "repeat each coordinate": "a subspace, which other ways may complete",
    "reach only part": "a subspace, which other ways may complete",
    "also read by": "a value with several readers, not all linear",
}


def cause(graph: Graph, verdict: Verdict) -> str:
    """Which kind of argument would have to decide an unknown."""
    facts = Planner(graph).facts
    free = [p.name for p in graph.parameters if p.name in graph.uses and not (p.tied or p.frozen)]
    if facts.undefined:
        return "a norm without epsilon over what may be zero: no value"
    if any(name in graph.before_mixing for name in free):
        return OPAQUE
    if any(len(graph.uses[name]) > 1 for name in free):
        return "a parameter with several equations, not all linear"
    said = " ".join(o.reason for o in verdict.obstructions)
    found = [kind for words, kind in CAUSES.items() if words in said]
    return found[-1] if found else "a bounded or one-sided set, which other ways may complete"


# -- a yes is carried out --------------------------------------------------------------------------


def promised(graph: Graph, verdict: Verdict) -> Iterator[tuple[str, Route, int]]:
    """The routes of a yes, each under a name and with numbers of tokens that it claims to serve."""
    most = max((n for n in range(1, MOST_TOKENS + 1) if verdict.capacity.serves(n)), default=1)
    for tokens in sorted({1, min(most, 3), most}):
        for strategy, route in offers(Planner(graph), tokens).items():
            yield f"{strategy} for {tokens}", route, tokens
    for route in verdict.routes:
        most = max((n for n in range(1, MOST_TOKENS + 1) if route.capacity.serves(n)), default=0)
        if most:
            yield f"{' + '.join(route.parameters)} for {most}", route, most


def carry_out(record: Record, graph: Graph, verdict: Verdict, seeds: range) -> None:
    """Solves and runs every route of a yes; what is not exact, and has no excuse, goes to `record.faults`."""
    done: set[tuple[Any, int]] = set()
    for name, route, tokens in promised(graph, verdict):
        if (route.steps, tokens) in done:
            continue
        done.add((route.steps, tokens))
        plan = Plan(name, (), route.numbers, route, graph)
        for seed in seeds:
            record.runs += 1
            drawn = trial.draw(graph, seed, tokens)
            error, said = _carried(plan, drawn)
            if error <= EXACT:
                record.worst = max(record.worst, error)
            elif cause := excuse(record.document, plan, drawn, said):
                record.aside[cause] += 1
            else:
                record.faults.append(f"{name} (seed {seed}): {said or f'relative L-inf {error:.2e}'}")


def _carried(plan: Plan, drawn: trial.Trial) -> tuple[float, str]:
    """The plan's relative L-inf error on a draw; infinite, with the message, where it is refused."""
    try:
        error = trial.solve(drawn, plan).relative_linf
    except ConditionViolated as violated:
        return float("inf"), str(violated)
    return (error if np.isfinite(error) else float("inf")), ""


def excuse(document: Mapping[str, Any], plan: Plan, drawn: trial.Trial, refused: str) -> str:
    """Why a draw says nothing about the plan, or nothing.

    - `open condition`: the route says itself that it may be refused for whole regions;
    - `nothing to patch`: the context makes no difference but for rounding;
    - `ill-conditioned`: measured, as the condition number of the equations to be solved, or as what rounding every
      patched parameter once (relative 2^-53) does to the output; or other draws are served: where all functions are
      analytic, what some draws have is what all but a set of measure zero have, and this one misses it by rounding
      (with pieces and one token, three quiet draws in four must be served);
    - `tokens in one piece`: where functions have pieces, tokens may all lie in one; other tokens, that do not, are
      served, so that the capacity, which is an upper bound, is met.
    """
    if refused and plan.route.conditional:
        return "open condition"
    if not refused and _rounding_explains(plan, drawn):
        return "ill-conditioned"
    steep = max(_conditions(document, plan, drawn), default=1.0)
    if STEEP < steep < np.inf:
        return "ill-conditioned"
    if not refused and steep < np.inf:
        return ""
    if _carried(replace(plan, route=Route((), "none")), drawn)[0] <= EXACT:
        return "nothing to patch"
    again = [trial.draw(plan.graph, 10_000 + k, drawn.tokens) for k in range(AGAIN)]
    met = [_carried(plan, _louder(other, 3.0 ** (k % 6 - 1)))[0] <= EXACT for k, other in enumerate(again)]
    pieces = any(word in str(document) for word in PIECEWISE)
    if drawn.tokens > 1 and pieces:
        return "tokens in one piece" if any(met) else ""
    served = sum(met[0::6]) + sum(met[1::6]) >= 3 if pieces else any(met)
    return "ill-conditioned" if served else ""


def _louder(drawn: trial.Trial, loud: float) -> trial.Trial:
    """The draw with all numbers `loud` times as large: where functions are less straight, or less flat."""
    mixing = {n: replace(m, contextual=loud * m.contextual, reduced=loud * m.reduced) for n, m in drawn.mixing.items()}
    parameters = {n: loud * p for n, p in drawn.parameters.items()}
    return replace(drawn, input=loud * drawn.input, mixing=mixing, parameters=parameters)


def _rounding_explains(plan: Plan, drawn: trial.Trial) -> bool:
    """Whether storing the patched parameters in float64 moves the output by as much as the error."""
    graph, result = plan.graph, trial.solve(drawn, plan)
    rng, moved = np.random.default_rng(0), 0.0
    for _ in range(4):
        off = {n: p * (1 + trial.EPS * rng.choice((-1, 1), p.shape)) for n, p in result.patched_parameters.items()}
        again = trial.run(drawn, False, (graph.output,), off)[graph.output]
        moved = max(moved, trial.relative_linf(again, result.output_patched))
    return result.relative_linf <= SLACK * moved


def _conditions(document: Mapping[str, Any], plan: Plan, drawn: trial.Trial) -> Iterator[float]:
    """For every step, the condition number of its goal as a function of its parameter; infinite without full rank."""
    for step in plan.route.steps:
        force = Attack([_instance({**document["graph"], "output": step.goal}, drawn, 1.0)])
        theta = np.concatenate([drawn.parameters[n].ravel() for n in force.free])[None]
        slopes = force.jacobian(theta, force.values(theta, np.zeros(1, int)))[0]
        first = sum(force.sizes[: force.free.index(step.parameter)])
        sizes = np.linalg.svd(slopes[:, first : first + drawn.parameters[step.parameter].size], compute_uv=False)
        full = len(sizes) == len(slopes) and sizes[-1] > sizes[0] * 1e-15
        yield float(sizes[0] / sizes[-1]) if full else np.inf


# -- a no is attacked ------------------------------------------------------------------------------


def _instance(graph: Mapping[str, Any], drawn: trial.Trial, loud: float) -> Instance:
    matrices = {n: m.matrices for n, m in drawn.mixing.items()}
    contextual = {n: loud * m.contextual for n, m in drawn.mixing.items()}
    reduced = {n: m.reduced for n, m in drawn.mixing.items()}
    return Instance(graph, drawn.parameters, drawn.input, matrices, contextual, reduced)


def instances(document: Mapping[str, Any], graph: Graph, seed: int, contexts: int, tokens: int = 1) -> list[Instance]:
    """One draw of weights with several contexts, quiet and loud."""
    drawn = [trial.draw(graph, seed * 1000 + k, tokens) for k in range(contexts)]
    first = drawn[0]
    same = [replace(d, parameters=first.parameters, mixing=_mixing(first, d)) for d in drawn]
    return [_instance(document["graph"], d, LOUDNESS[k % len(LOUDNESS)]) for k, d in enumerate(same)]


def _mixing(first: trial.Trial, drawn: trial.Trial) -> dict[str, trial.Mixing]:
    """The draw's offsets, with the first draw's matrices."""
    return {n: replace(m, matrices=first.mixing[n].matrices) for n, m in drawn.mixing.items()}


def attack(
    document: Mapping[str, Any],
    graph: Graph,
    seed: int = 0,
    contexts: int = 4,
    tokens: int = 1,
    starts: int = 3,
    steps: int = 60,
    rounds: int = 2,
) -> tuple[float, ...]:
    """The least error by context; contexts that hold out are attacked again, harder, `rounds` times in all."""
    force = Attack(instances(document, graph, seed, contexts, tokens))
    reached = force.errors(starts, steps, seed)
    for again in range(1, rounds):
        left = np.flatnonzero(reached > FAILED)
        if not left.size:
            break
        more = force.errors(starts * 3**again, steps * 2, seed + again, left)
        reached[left] = np.minimum(reached[left], more)
    return tuple(float(r) if np.isfinite(r) else np.inf for r in reached)


def examine(document: Mapping[str, Any], seed: int = 0, tokens: int = 1, seeds: int = 2) -> Record:
    """The whole examination of one design."""
    graph = lowered(document)
    verdict = judge(graph) if tokens == 1 else judge(graph, tokens)
    record = Record(document, answer_of(verdict))
    if record.answer == "unknown":
        record.why = cause(graph, verdict)
    if record.answer == "yes":
        carry_out(record, graph, verdict, range(seed, seed + seeds))
    else:
        record.reached = attack(document, graph, seed, tokens=tokens)
        if record.answer == "no" and record.solved:  # rarely is every one of a few contexts within reach: ask for more
            more = (attack(document, graph, seed + k, 12, tokens, rounds=3) for k in (1, 2))
            record.reached += tuple(error for errors in more for error in errors)
    return record


def insist(seeds: range) -> None:
    """Examines the designs of some seeds.

    Raises:
        AssertionError: a wrong answer; too many unknowns that are not opaque; too many plans set aside.
    """
    records = {seed: examine(seeded(seed), seed) for seed in seeds}
    wrong = {seed: record.faults or record.reached for seed, record in records.items() if record.wrong}
    assert wrong == {}
    unknown = Counter(r.why for r in records.values() if r.answer == "unknown")
    assert unknown.total() - unknown[OPAQUE] <= MOST_UNKNOWN * len(seeds), unknown
    aside = sum((r.aside for r in records.values()), Counter[str]())
    del aside["open condition"]
    assert aside.total() <= MOST_ASIDE * sum(r.runs for r in records.values()), aside
