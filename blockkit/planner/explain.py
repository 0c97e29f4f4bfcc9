"""Verdicts and routes in words: which rule fired where, what each condition means, and what would unblock a no.

The rules are numbered as in `blockkit.planner.rule`. Nothing is derived here: a route already holds every law that it
uses, and what would unblock a design comes from `blockkit.planner.unblocking`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..display import short
from ..graph.graph import Graph
from ..graph.reach import Reach
from .route import Link, Route, Step
from .unblocking import Change, Changes, smallest_changes
from .verdict import Verdict

MOST_ARGUMENTS = 12  # of an operation; more are left out
MOST_LINKS = 40  # longer derivations are shortened in the middle
RULES = (
    "where t is the target of the node on the left, and n_C the value of n in the contextual run, and",
    "  restore: rule 1, it does not depend on the context; rule 2, steer it; rule 3, restore all that it reads;",
    "  steer: rule 1, a parameter that may move; rule 2, a node that nothing else reads; rule 3, a norm's direction;",
    "    rule 4, a parameter that reaches the target in several ways, all of them linear.",
)


@dataclass(frozen=True)
class Explanation:
    """A verdict with its reasons in words.

    Attributes:
        graph: the block of which the routes are shown (the first kind, where there are several).
        changes: for each kind of block that is not patchable, by its name, what would unblock it.
    """

    verdict: Verdict
    graph: Graph
    changes: dict[str, Changes]

    __repr__ = short

    @property
    def listed(self) -> tuple[tuple[str, Change], ...]:
        """Every change that was found, with the kind of block it is for, the smallest first."""
        return tuple((kind, change) for kind, changes in self.changes.items() for change in changes.found)

    @property
    def blocking(self) -> tuple[str, ...]:
        """A smallest set of parameters and operations whose undoing makes the design patchable."""
        return tuple(dict.fromkeys(name for changes in self.changes.values() for name in changes.blocking))

    def __str__(self) -> str:
        return self.page()

    def _repr_html_(self) -> str:
        return self.verdict.html(self._advice())

    def page(self, derived: bool = False) -> str:
        """What a person reads: the verdict, its conditions in words, and the smallest change for a no.

        Args:
            derived: with the derivation of every route.
        """
        verdict = self.verdict
        lines = list(verdict.lines((lambda route: derivation(self.graph, route)) if derived else None))
        lines.extend(RULES if derived and verdict.routes else ())
        return "\n".join([*lines, *self._advice()])

    def _advice(self) -> Iterator[str]:
        for kind, changes in self.changes.items():
            where = f" of {kind}" if len(self.changes) > 1 else ""
            for number, change in enumerate(changes.found):
                yield f"{'or' if number else f'smallest change{where}'}: {change.text}   ({_outcome(change)})"
            if not changes.found:
                yield f"smallest change{where}: none of the edits tried makes it patchable"
            if changes.capped:
                yield f"  ({changes.capped})"


def explain(graph: Graph, verdict: Verdict, blocked: dict[str, Graph], tokens: int | None = None) -> Explanation:
    """The reasons behind a verdict.

    Args:
        graph: a block that has the routes of the verdict.
        blocked: the kinds of blocks that are not patchable, by name.
        tokens: how many tokens one static patch has to serve.
    """
    return Explanation(verdict, graph, {kind: smallest_changes(g, tokens) for kind, g in blocked.items()})


def derivation(graph: Graph, route: Route) -> list[str]:
    """The rules that fired, goal by goal: a line for each law on the way down, then its conditions."""
    if not route.steps:
        return [f"rule 1 of restore: {graph.output} does not depend on the context, there is nothing to do"]
    lines: list[str] = []
    for step in route.steps:
        lines.extend(_of_step(graph, step))
    if len({s.goal for s in route.steps}) > 1:
        follow = "rule 3 of restore: what reads restored values only follows"
        lines.append(f"{follow}, so {graph.output} is restored")
    elif (goal := route.steps[0].goal) != graph.output:
        lines.append(f"rule 3 of restore: the context reaches {graph.output} only through {goal}, so the block follows")
    return lines


def _of_step(graph: Graph, step: Step) -> Iterator[str]:
    if step.exact:
        yield f"rule 2 of restore: steer {step.goal} to its contextual value, t = {step.goal}_C"
    else:
        yield f"rule 3 of steer: turn the direction that a norm reads, so that {step.goal} comes as near t as it can"
    left_out = len(step.path) - MOST_LINKS
    for link in step.path if left_out <= 0 else step.path[: MOST_LINKS // 2]:
        yield f"  {_of_link(graph, link)}"
    if left_out > 0:
        yield f"  ... {left_out} more operations, each solved for the one below it"
        yield from (f"  {_of_link(graph, link)}" for link in step.path[-MOST_LINKS // 2 :])
    if step.region:
        yield f"  rule 4 of steer: {step.parameter} reaches {step.goal} in several ways, all linear: one joint equation"
    for condition in step.conditions:
        yield f"  if {condition}"


def _of_link(graph: Graph, link: Link) -> str:
    arg = graph.node[link.node].args[link.position]
    rule = 1 if arg in graph.parameter else 2 if link.law.reach is Reach.ALL else 3
    solved = f"{link.node} = {equation(graph, link.node)} is solved for {arg}"
    return f"rule {rule} of steer: {solved}, {link.law.formula}   [{link.law.source}]"


def equation(graph: Graph, name: str) -> str:
    """The right-hand side of a node, as `W @ z`, `a + b` or `op(a, b)`."""
    node = graph.node[name]
    offset = getattr(node.op, "offset", 0.0)
    match node.op.kind:
        case "matmul":
            return f"{node.args[1]} @ {node.args[0]}"
        case "add":
            return " + ".join(_shortened(node.args))
        case "multiply":
            return f"{node.args[0]} * " + (f"({offset:g} + {node.args[1]})" if offset else node.args[1])
        case "scale":
            return f"{node.op.alpha:g} {node.args[0]}"  # type: ignore[attr-defined]
        case kind:
            return f"{getattr(node.op, 'fn', kind)}({', '.join(_shortened(node.args))})"


def _shortened(names: tuple[str, ...]) -> tuple[str, ...]:
    return names if len(names) <= MOST_ARGUMENTS else (*names[: MOST_ARGUMENTS - 1], "...", names[-1])


def _outcome(change: Change) -> str:
    best = change.verdict.routes[0]
    count = f"{change.numbers} new numbers" if change.numbers.known != 0 else "no new numbers"
    same = "" if change.keeps_function else ", another function"
    return f"then {' + '.join(best.parameters)}, for {change.verdict.capacity} token(s); {count}{same}"
