"""A block as a Mermaid flowchart, from the stream at the bottom to the output at the top."""

from __future__ import annotations

from ..planner.plan import Plan
from .drawing import Box, Form, Paint, draw
from .svg import ACCENT, FILL, INK, PALE

_ESCAPES = {
    "#": "#35;",
    '"': "#quot;",
    "<": "#lt;",
    ">": "#gt;",
    "&": "#amp;",
    "`": "#96;",
    "%": "#37;",
    "'": "#39;",
    ";": "#59;",
}


def mermaid(plan: Plan) -> str:
    """The block of a plan, with the plan's route highlighted.

    Raises:
        BadInput: there are too many components for a drawing.
    """
    drawing = draw(plan.graph, plan.route)
    lines = ["flowchart BT"]
    lines.extend(f"  {_node(i, box)}" for i, box in enumerate(drawing.boxes))
    lines.extend(f"  n{a} {'==>' if (a, b) in drawing.route_edges else '-->'} n{b}" for a, b in drawing.edges)
    lines.append(f"  n{drawing.output} --> out(( ))")
    used = [p for p in Paint if any(b.paint is p and b.form is Form.COMPONENT for b in drawing.boxes)]
    lines.append("  subgraph legend")
    lines.extend(f'    {_class(p)}_key["{p.value}"]:::{_class(p)}' for p in used)
    lines.append('    route_key["on the route of the plan"]:::route')
    lines.append("  end")
    lines.extend(f"  classDef {_class(p)} fill:{FILL[p]},stroke:{PALE},color:{INK}" for p in Paint)
    lines.append(f"  classDef route stroke:{ACCENT},stroke-width:3px")
    marked = [i for i, e in enumerate(drawing.edges) if e in drawing.route_edges]
    if marked:
        lines.append(f"  linkStyle {','.join(map(str, marked))} stroke:{ACCENT},stroke-width:3px")
    on_route = [f"n{i}" for i, box in enumerate(drawing.boxes) if box.on_route]
    if on_route:
        lines.append(f"  class {','.join(on_route)} route")
    return "\n".join(lines)


def _node(index: int, box: Box) -> str:
    label = _escaped(box.name)
    if box.form is Form.STREAM:
        return f'n{index}(["{label}"])'
    if box.form in (Form.SUM, Form.PRODUCT):
        return f'n{index}(("{label}: {box.form.value}"))'
    solved = [f"solve {p.removeprefix(f'{box.name}.')}" for p in box.solved]
    rest = [", ".join(dict.fromkeys(box.operations)), box.abilities, *solved]
    text = "<br/>".join([f"<b>{label}</b>", *(_escaped(line) for line in rest if line)])
    return f'n{index}["{text}"]:::{_class(box.paint)}'


def _class(paint: Paint) -> str:
    return paint.name.lower()


def _escaped(text: str) -> str:
    return "".join(_ESCAPES.get(c, " " if c.isspace() else c) for c in text)
