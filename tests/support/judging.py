"""Blocks to judge, and what it takes to believe an answer: numbers for a yes, an attack for a no."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

import blockkit as bk
from blockkit.design import catalog
from blockkit.design.components import Component, stream
from blockkit.graph.graph import Graph, Node, Parameter
from blockkit.graph.ops import Op
from blockkit.graph.sizes import Size
from blockkit.planner.plan import make_plan, offers
from blockkit.planner.routes import Planner
from blockkit.planner.verdict import Verdict, judge
from blockkit.trials import trial

TOLERANCE = 1e-9
SMALL = {
    "d_model": 12, "d_ff": 20, "heads": 2, "kv_heads": 1, "head_dim": 4, "scale_dim": 4, "window": 8, "layers": 2,
    "vocabulary": 30, "context_length": 64, "embedding_scale": 1.0, "rope_base": 1e4, "local_rope_base": 1e4,
    "global_rope_base": 1e6, "tied": False,
}  # fmt: skip

FIRST = ("gemma3", "gpt2", "llama", "vanilla")  # every other family: tests/test_catalogue.py


# ---------------------------------------------------------------- helpers


def small(family: str) -> Graph:
    """The first block of a catalogue family, with small sizes."""
    return next(iter(catalog.entry(family).bound(SMALL, family).graphs.values()))


def block(output: Component, width: int = 4, tied: tuple[str, ...] = (), frozen: tuple[str, ...] = ()) -> Graph:
    return bk.Block(output, width, tied=tied, frozen=frozen).graph()


def raw(
    nodes: Mapping[str, tuple[Op, str]], parameters: Mapping[str, tuple[int, ...]] | None = None, output: str = "y",
    frozen: Iterable[str] = (), width: int = 4,
) -> Graph:  # fmt: skip
    stored = [Parameter(n, tuple(Size.of(s) for s in shape), frozen=n in frozen) for n, shape in
              (parameters or {}).items()]  # fmt: skip
    listed = [Node(n, op, tuple(args.split())) for n, (op, args) in nodes.items()]
    return Graph.build("x", output, Size.of(width), stored, listed)


def served(verdict: Verdict) -> dict[tuple[str, ...], str]:
    """Capacity by route."""
    return {r.parameters: str(r.capacity) for r in verdict.routes}


def singles(verdict: Verdict) -> dict[str, str]:
    return {r.parameters[0]: str(r.capacity) for r in verdict.routes if len(r.steps) == 1}


def reasons(verdict: Verdict) -> str:
    return "; ".join(f"{o.node}: {o.reason}" for o in verdict.obstructions)


def loud(drawn: trial.Trial, factor: float) -> trial.Trial:
    """The same trial with a larger context."""
    mixing = {n: replace(m, contextual=factor * m.contextual) for n, m in drawn.mixing.items()}
    return replace(drawn, mixing=mixing)


def context_moves(drawn: trial.Trial) -> float:
    """How far the two runs are apart without a patch."""
    output = drawn.graph.output
    return trial.relative_linf(*(trial.run(drawn, c, (output,))[output] for c in (False, True)))


# ---------------------------------------------------------------- the attack


def attack(drawn: trial.Trial, starts: int = 3, steps: int = 60, seed: int = 0) -> float:
    """The least relative error that Levenberg-Marquardt finds over all free parameters, from several starts."""
    free = [p.name for p in drawn.graph.parameters if not (p.tied or p.frozen)]
    flat = np.concatenate([drawn.parameters[n].ravel() for n in free])
    rng, output = np.random.default_rng(seed), drawn.graph.output
    wanted = trial.run(drawn, True, (output,))[output]

    def error(theta: np.ndarray) -> np.ndarray:
        ends = np.cumsum([drawn.parameters[n].size for n in free])[:-1]
        parts = dict(zip(free, np.split(theta, ends), strict=True))
        moved = {n: parts[n].reshape(v.shape) if n in parts else v for n, v in drawn.parameters.items()}
        return (trial.run(drawn, False, (output,), moved)[output] - wanted).ravel()

    scale = float(np.abs(wanted).max())
    firsts = [flat, *(flat + s * rng.normal(size=flat.size) for s in np.linspace(0.5, 3, starts - 1))]
    return min(float(np.abs(error(descend(error, theta, steps))).max()) / scale for theta in firsts)


def descend(error: Callable[[np.ndarray], np.ndarray], theta: np.ndarray, steps: int) -> np.ndarray:
    """Levenberg-Marquardt with forward differences."""
    left, damping = error(theta), 1e-2
    for _ in range(steps):
        if np.abs(left).max() < 1e-10 or damping > 1e12:
            break
        h = 1e-7
        slope = np.stack([(error(theta + h * e) - left) / h for e in np.eye(theta.size)], axis=1)
        gram = slope @ slope.T
        move = slope.T @ np.linalg.solve(gram + damping * (1e-12 + np.trace(gram)) * np.eye(len(gram)), left)
        again = error(theta - move)
        if np.sum(again**2) < np.sum(left**2):
            theta, left, damping = theta - move, again, damping / 5
        else:
            damping *= 4
    return theta


def insist_on_no(graph: Graph, *said: str, tokens: int | None = None, factor: float = 6.0) -> Verdict:
    """The verdict is no, for the reason given, and no attack gets through for some context."""
    verdict = judge(graph, tokens)
    assert verdict.patchable is False
    for part in said:
        assert part in reasons(verdict)
    assert any(attack(loud(trial.draw(graph, seed, tokens or 1), factor)) > 1e-3 for seed in range(3))
    return verdict


# ---------------------------------------------------------------- residual blocks to judge

x = stream()
MIXED = x + bk.Mixer(x)


def outer(branch: Callable[[Component], Component]) -> Component:
    """v + branch(v), with v = x + mixer(x), which has no parameters."""
    return MIXED + branch(MIXED)


def mlp(z: Component, **settings: str) -> bk.MLP:
    return bk.MLP(z, hidden=6, name="mlp", **settings)  # type: ignore[arg-type]


def insist_on_yes(graph: Graph, only: Iterable[str], capacity: str, tokens: Iterable[int] = (1,)) -> Verdict:
    """Patchable by those parameters alone, for as many tokens, and the numbers agree."""
    restricted = graph.restricted(only)
    verdict = judge(restricted)
    assert verdict.patchable is True
    assert str(verdict.capacity) == capacity
    for count in tokens:
        for strategy in offers(Planner(restricted), count):
            insist_on_plan(restricted, strategy, count)
    return verdict


def insist_on_plan(graph: Graph, strategy: str, tokens: int = 1, per_token: bool = False) -> None:
    for seed in range(3):
        plan = make_plan(graph, strategy, None if per_token else tokens)
        insist_on_result(trial.solve(trial.draw(graph, seed, tokens), plan, per_token))


def insist_on_result(result: trial.Result) -> None:
    assert result.unpatched_relative > 1e-3
    assert result.relative_linf <= TOLERANCE


def parallel() -> Graph:
    h = bk.LayerNorm(x, name="norm")
    return block(x + bk.Attention(h, heads=2, head_dim=3, name="attention") + mlp(h, bias=True), 5)  # type: ignore[arg-type]
