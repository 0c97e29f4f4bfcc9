"""A plan as a LaTeX document: the block's equations, the goal, and how each parameter is solved for.

The document needs nothing but the class `article` and the package `amsmath`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..graph.graph import Graph, Node
from ..graph.laws import Action
from ..graph.ops import Activation, Add, LayerNorm, MatMul, Multiply, RMSNorm, Scale, Softcap, show_shape
from ..planner.plan import Plan, PlanStep
from ..planner.route import Link, Step

MOST_NODES = 300  # equations of the block that are written out
MOST_LINKS = 40  # pulled-back targets of one step that are written out
WIDEST = 46  # characters of names in a line of a sum

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''",
}  # fmt: skip
_PREAMBLE = r"""\documentclass{article}
\usepackage{amsmath}
\allowdisplaybreaks
\setlength{\textwidth}{170mm}
\setlength{\oddsidemargin}{-5mm}
\setlength{\evensidemargin}{-5mm}
\setlength{\parindent}{0pt}
\newcommand{\var}[1]{\mathsf{#1}}
\newcommand{\ctx}[1]{{#1}^{C}}
\newcommand{\target}[1]{\tau\!\left[#1\right]}
\raggedright"""


def latex(plan: Plan, title: str = "block") -> str:
    """The derivation of a plan as a document that compiles on its own."""
    lines = [
        _PREAMBLE,
        rf"\title{{A patch for {_text(title)}, strategy \emph{{{_text(plan.strategy)}}}}}",
        r"\date{}",
        r"\begin{document}",
        r"\maketitle",
        *_block(plan.graph),
        *_goal(plan),
    ]
    for number, (step, shown) in enumerate(zip(plan.route.steps, plan.steps, strict=True), 1):
        lines.extend(_step(plan.graph, number, step, shown))
    return "\n".join([*lines, r"\end{document}", ""])


# -- names and numbers ---------------------------------------------------------------------------


def _text(text: str) -> str:
    """Any text, for running text: what TeX would read as a command is escaped, what it has no glyph for becomes `?`."""
    return "".join(_SPECIAL.get(c, c if c.isascii() and c.isprintable() else "?") for c in text)


def _name(name: str) -> str:
    return rf"\var{{\text{{{_text(name)}}}}}"


def _number(value: float) -> str:
    mantissa, _, exponent = f"{value:g}".partition("e")
    return rf"{mantissa}\cdot 10^{{{int(exponent)}}}" if exponent else mantissa


# -- the block -----------------------------------------------------------------------------------


def _block(graph: Graph) -> Iterator[str]:
    yield r"\section*{The block}"
    yield rf"It takes ${_name(graph.input)}$ to ${_name(graph.output)}$, of width ${_size(str(graph.width))}$:"
    nodes = [n for n in graph.nodes if n.name in graph.relevant]
    yield from _aligned(f"{_name(n.name)} &= {_value(n)}" for n in nodes[:MOST_NODES])
    if len(nodes) > MOST_NODES:
        yield f"and {len(nodes) - MOST_NODES} more operations."
    if stored := [p for p in graph.parameters if p.name in graph.uses]:
        listed = ", ".join(rf"${_name(p.name)}\,{_size(show_shape(p.shape))}$" for p in stored[:MOST_NODES])
        yield rf"Its parameters are {listed}{'' if len(stored) <= MOST_NODES else ', and more'}."
    held = [p for p in stored if p.tied or p.frozen]
    if held:
        yield rf"May not move: {', '.join(f'${_name(p.name)}$' for p in held[:MOST_NODES])}."


def _aligned(rows: Iterable[str]) -> Iterator[str]:
    yield r"\begin{align*}"
    yield " \\\\\n".join(f"  {row}" for row in rows)
    yield r"\end{align*}"


def _size(text: str) -> str:
    return rf"\text{{{_text(text)}}}"


def _value(node: Node) -> str:
    op, names = node.op, [_name(a) for a in node.args]
    again = 2 if isinstance(op, LayerNorm) else 1 if isinstance(op, RMSNorm) else 0  # names its argument once more
    length = len(node.name) + sum(map(len, node.args)) + again * len(node.args[0] if node.args else "")
    over = r" \\ &\quad " if length > 1.4 * WIDEST else ""
    match op:
        case MatMul():
            return rf"{names[1]} {over}\cdot {names[0]}"
        case Add():
            return _sum(node.args)
        case Multiply():
            second = rf"\left({_number(op.offset)} + {names[1]}\right)" if op.offset else names[1]
            return rf"{names[0]} {over}\odot {second}"
        case Scale():
            return rf"{_number(op.alpha)}\,{names[0]}"
        case RMSNorm():
            return rf"{names[0]}{over}\Big/ \sqrt{{\operatorname{{mean}}({names[0]}^2) + {_number(op.eps)}}}"
        case LayerNorm():
            inner = rf"{names[0]} - \operatorname{{mean}}({names[0]})"
            return rf"\left({inner}\right){over}\Big/ \sqrt{{\operatorname{{var}}({names[0]}) + {_number(op.eps)}}}"
        case Softcap():
            return rf"{_number(op.cap)} \tanh\left({names[0]} / {_number(op.cap)}\right)"
    called = op.fn if isinstance(op, Activation) else op.kind
    return rf"\operatorname{{{_text(called)}}}\left({_broken(node.args, ', ')}\right)"


def _sum(args: tuple[str, ...]) -> str:
    return _broken(args, " + ")


def _broken(args: tuple[str, ...], mark: str) -> str:
    """The names one after the other, on as many lines as they need."""
    rows: list[list[str]] = [[]]
    length = 0
    for arg in args:
        length += len(arg) + 3
        if length > WIDEST and rows[-1]:
            rows.append([])
            length = len(arg)
        rows[-1].append(_name(arg))
    if len(rows) == 1:
        return mark.join(rows[0])
    joined = mark.rstrip() + r"\right. \\ &\quad \left. " if mark == ", " else mark.rstrip() + r" \\ &\quad "
    return joined.join(mark.join(row) for row in rows)


# -- the derivation ------------------------------------------------------------------------------


def _goal(plan: Plan) -> Iterator[str]:
    output = _name(plan.graph.output)
    yield r"\section*{The goal}"
    yield (
        rf"Write $\ctx{{n}}$ for the value of a node $n$ in the run that sees the context, and $n$ for its value in "
        rf"the run that does not. Wanted are parameters with ${output} = \ctx{{{output}}}$. "
        r"Below, $\target{n}$ is the value that $n$ has to take, primed is what a parameter becomes."
    )
    if not plan.steps:
        yield rf"There is nothing to do: ${output}$ does not depend on the context."
    else:
        names = ", ".join(f"${_name(p)}$" for p in plan.route.parameters)
        yield (
            rf"The plan solves for {names}, in this order ({_text(plan.route.source)}); "
            rf"it stores ${_size(str(plan.numbers_stored))}$ numbers."
        )


def _step(graph: Graph, number: int, step: Step, shown: PlanStep) -> Iterator[str]:
    goal = _name(step.goal)
    yield rf"\section*{{Step {number}: ${_name(step.parameter)}$}}"
    if step.exact:
        yield rf"So that ${goal}$ takes its contextual value:"
    else:
        yield rf"So that ${goal}$ comes as near its contextual value as a direction can; the next step takes the rest:"
    links = step.path if len(step.path) <= MOST_LINKS else step.path[: MOST_LINKS // 2]
    rows = [rf"\target{{{goal}}} &= \ctx{{{goal}}}", *(_pulled(graph, link) for link in links)]
    yield from _aligned(rows)
    if len(links) < len(step.path):
        yield rf"and so on through {len(step.path) - len(links)} more operations, the last of which gives"
        yield from _aligned([_pulled(graph, step.path[-1])])
    if step.region:
        several = rf"${_name(step.parameter)}$ reaches ${goal}$ in several ways, all of them linear"
        yield rf"{several}: the equations of all ways are solved together."
    yield rf"Law: \texttt{{{_text(shown.law)}}}. Source: {_text(shown.source)}."
    if step.conditions:
        yield r"It is exact if"
        yield r"\begin{itemize}"
        yield from (rf"  \item {_text(f'{c.text} ({c.kind.meaning})')}" for c in step.conditions)
        yield r"\end{itemize}"


def _pulled(graph: Graph, link: Link) -> str:
    """What the argument of one law has to become, given what its result has to become."""
    node = graph.node[link.node]
    arg, here = node.args[link.position], _name(link.node)
    old, target = _name(arg), rf"\target{{{_name(link.node)}}}"
    left = rf"{old}'" if arg in graph.parameter else rf"\target{{{old}}}"
    gap = rf"\left({target} - {here}\right)"
    others = [_name(a) for i, a in enumerate(node.args) if i != link.position]
    match link.law.action, node.op:
        case Action.SHIFT, _:
            right = [old, rf"{{}} + {gap}"]
        case Action.DIVIDE, Multiply(offset=offset):
            divisor = rf"\left({_number(offset)} + {others[0]}\right)" if offset and link.position == 0 else others[0]
            right = [old, rf"{{}} + {gap}", rf"\oslash {divisor}"]
        case Action.SCALE, Scale(alpha=alpha):
            right = [old, rf"{{}} + {gap} / {_number(alpha)}"]
        case Action.WEIGHT, _:
            right = [old, rf"{{}} + {gap}", rf"{others[0]}^{{\top}} \big/ \lVert {others[0]} \rVert^2"]
        case Action.THROUGH, _:
            right = [old, rf"{{}} + {others[0]}^{{+}}", gap]
        case Action.DIRECTION, _:
            right = [
                rf"\operatorname{{rms}}(\ctx{{{old}}})\,n,",
                rf"n \text{{ the unit-RMS vector nearest to }} {target}",
            ]
        case _:
            right = [rf"\text{{{_text(link.law.formula)}, with }}", rf"t = {target}"]
    written = 2 * len(link.node) + 2 * len(arg) + sum(len(a) for a in node.args if a != arg)
    return rf"{left} &= " + (r" \\ &\quad " if written > WIDEST else r"\, ").join(right)
