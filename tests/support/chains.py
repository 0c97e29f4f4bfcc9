"""Graphs of a few operations with one parameter that may move, and how its step is judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, settings

from blockkit.graph.changes import Change, dense, plus
from blockkit.graph.graph import Graph, Node, Parameter
from blockkit.graph.ops import Activation, Add, Concat, MatMul, Mix, Multiply, Op, Scale, Slice
from blockkit.graph.sizes import Size
from blockkit.planner.route import Route, Step
from blockkit.planner.routes import Planner
from blockkit.solve.step import Operands, solve_step
from blockkit.trials import trial

TOLERANCE = 1e-9
EPS = 2.0**-53
SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# ---------------------------------------------------------------- graphs of a few operations


@dataclass
class Builder:
    """A graph in the making. Signals are known maps of the input; only `leaf` may move."""

    width: int
    leaf: str = ""
    parameters: list[Parameter] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)

    def store(self, *shape: int, free: bool = False) -> str:
        name = "leaf" if free else f"p{len(self.parameters)}"
        self.parameters.append(Parameter(name, tuple(Size.of(s) for s in shape), frozen=not free))
        return name

    def add(self, op: Op, width: int, *args: str) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(Node(name, op, args))
        self.widths[name] = width
        return name

    def signal(self, width: int) -> str:
        return self.add(MatMul(), width, "x", self.store(width, self.width))

    def finish(self, last: str) -> Graph:
        """The block `last + mixer(x)`: the leaf has to undo what the mixer brings in."""
        mixed = self.add(Mix(), self.width, "x")
        top = self.add(Add(), self.width, last, mixed)
        return Graph.build("x", top, Size.of(self.width), self.parameters, self.nodes)


LEAVES: dict[str, Callable[[Builder, int], str]] = {
    "bias": lambda b, w: b.add(Add(), w, b.signal(w), b.store(w, free=True)),
    "bias first": lambda b, w: b.add(Add(), w, b.store(w, free=True), b.signal(w), b.signal(w)),
    "weight": lambda b, w: b.add(MatMul(), w, b.signal(5), b.store(w, 5, free=True)),
    "scale": lambda b, w: b.add(Multiply(), w, b.signal(w), b.store(w, free=True)),
    "scale first": lambda b, w: b.add(Multiply(), w, b.store(w, free=True), b.signal(w)),
    "offset scale": lambda b, w: b.add(Multiply(1.0), w, b.signal(w), b.store(w, free=True)),
    "scale before offset": lambda b, w: b.add(Multiply(-0.5), w, b.store(w, free=True), b.signal(w)),
}


@dataclass(frozen=True)
class Link:
    """An operation over a value of width `w`, and the width below that gives it `w`."""

    put: Callable[[Builder, int, str], str]
    below: Callable[[int], int] = lambda w: w


LINKS: dict[str, Link] = {
    "add": Link(lambda b, w, u: b.add(Add(), w, u, b.signal(w))),
    "add last": Link(lambda b, w, u: b.add(Add(), w, b.signal(w), b.store(w), u)),
    "multiply": Link(lambda b, w, u: b.add(Multiply(), w, u, b.signal(w))),
    "multiply second": Link(lambda b, w, u: b.add(Multiply(), w, b.signal(w), u)),
    "multiply by parameter": Link(lambda b, w, u: b.add(Multiply(1.0), w, u, b.store(w))),
    "multiply with offset": Link(lambda b, w, u: b.add(Multiply(0.75), w, u, b.signal(w))),
    "multiply second with offset": Link(lambda b, w, u: b.add(Multiply(0.75), w, b.signal(w), u)),
    "scale": Link(lambda b, w, u: b.add(Scale(-2.5), w, u)),
    "matmul square": Link(lambda b, w, u: b.add(MatMul(), w, u, b.store(w, w))),
    "matmul wide": Link(lambda b, w, u: b.add(MatMul(), w, u, b.store(w, w + 3)), lambda w: w + 3),
    "slice": Link(lambda b, w, u: b.add(Slice(Size.of(1), Size.of(w + 1)), w, u), lambda w: w + 2),
    "concat of one": Link(lambda b, w, u: b.add(Concat(), w, u)),
    "identity": Link(lambda b, w, u: b.add(Activation("identity"), w, u)),
    "leaky_relu": Link(lambda b, w, u: b.add(Activation("leaky_relu"), w, u)),
}


def chain(leaf: str, links: Sequence[str], width: int = 4) -> Graph:
    """`leaf` at the bottom, then the links from the outermost one inward."""
    builder, widths = Builder(width), [width]
    for name in links:
        widths.append(LINKS[name].below(widths[-1]))
    value = LEAVES[leaf](builder, widths[-1])
    for name, w in zip(reversed(links), reversed(widths[:-1]), strict=True):
        value = LINKS[name].put(builder, w, value)
    return builder.finish(value)


def the_step(graph: Graph) -> Step:
    """The planner's only way to steer the output: one step for the leaf."""
    (route,) = list(Planner(graph).routes_to(graph.output))
    (step,) = route.steps
    assert step.parameter == "leaf"
    return step


# ---------------------------------------------------------------- the comparison


def asked_for(drawn: trial.Trial, seed: int, size: float = 1.0) -> np.ndarray:
    """Arbitrary targets, `[tokens, width]`: not only what a contextual run would ask for."""
    shape = (len(drawn.input), drawn.input.shape[1])
    return size * np.random.default_rng([seed, 7]).normal(size=shape)


def values_of(drawn: trial.Trial, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return trial.run(drawn, False, (drawn.graph.input, *drawn.graph.node), parameters)


def solve_for(drawn: trial.Trial, route: Route, target: np.ndarray) -> dict[str, np.ndarray]:
    """All parameters after the route was solved for `target` at the output, one static value for all tokens."""
    graph = drawn.graph
    wanted = {**trial.run(drawn, True, (graph.input, *graph.node)), graph.output: target}
    parameters, changes = dict(drawn.parameters), dict[str, Change]()
    for step in route.steps:
        run = Operands(wanted, values_of(drawn, parameters), lambda name: parameters[name], EPS)
        changes[step.parameter] = plus(changes.get(step.parameter), solve_step(step, graph, run, per_token=False))
        parameters[step.parameter] = dense(drawn.parameters[step.parameter], changes[step.parameter])
    return parameters


def insist_on_target(drawn: trial.Trial, route: Route, target: np.ndarray) -> None:
    """An ordinary run with the solved parameters gives the target, and without them it does not."""
    before = values_of(drawn, dict(drawn.parameters))[drawn.graph.output]
    after = values_of(drawn, solve_for(drawn, route, target))[drawn.graph.output]
    assert trial.relative_linf(before, target) > 1e-3
    assert trial.relative_linf(after, target) <= TOLERANCE


def insist_on_chain(leaf: str, links: Sequence[str], seed: int) -> None:
    graph = chain(leaf, links)
    drawn = trial.draw(graph, seed)
    insist_on_target(drawn, Route((the_step(graph),), ""), asked_for(drawn, seed))
