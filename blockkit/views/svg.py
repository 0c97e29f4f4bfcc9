"""A block drawn as SVG, written as plain text: the stream at the bottom, the output at the top."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from ..planner.plan import Plan
from .drawing import Box, Drawing, Form, Paint, draw
from .layered import Layout, place

MARGIN = 28.0
LEGEND_ROW = 22.0
CHARACTER = 6.3  # the width of a small one
RADIUS = 16.0  # of the circles of sums and products
STRAIGHT = 4.0  # the last piece of an edge, which gives its arrow the direction
LINE = 16.0  # between lines of text in a box
LONGEST = 40  # characters of a line in a box
CIRCLES = (Form.SUM, Form.PRODUCT)
ACCENT = "#c2410c"
INK = "#1f2937"
PALE = "#6b7280"
FILL = {
    Paint.BOTH: "#c8ead0",
    Paint.INPUT: "#cfe4fa",
    Paint.OUTPUT: "#fde7b0",
    Paint.NEITHER: "#f3f4f6",
    Paint.MIXING: "#e4d7f5",
    Paint.STREAM: "#ffffff",
}
STYLE = (
    "text{font-family:Helvetica,Arial,sans-serif;text-anchor:middle;fill:" + INK + "}"
    ".name{font-size:13px;font-weight:bold}.small{font-size:11px;fill:" + PALE + "}"
    ".solved{font-size:11px;font-weight:bold;fill:" + ACCENT + "}.left{text-anchor:start}.right{text-anchor:end}"
    ".box{stroke:" + PALE + ";stroke-width:1.2}.route .box{stroke:" + ACCENT + ";stroke-width:2.6}"
    ".edge{fill:none;stroke:" + PALE + ";stroke-width:1.4}.edge.route{stroke:" + ACCENT + ";stroke-width:2.8}"
)


def svg(plan: Plan, title: str = "block") -> str:
    """The block of a plan, with the plan's route highlighted.

    Raises:
        BadInput: there are too many components for a drawing.
    """
    route = " + ".join(plan.route.parameters) or "nothing to do"
    notes = [f"strategy {plan.strategy}, {plan.numbers_stored} numbers stored", f"solves {_short(route, 76)}"]
    return page(draw(plan.graph, plan.route), title, notes)


def page(drawing: Drawing, title: str, notes: list[str]) -> str:
    """A drawing on its page, with notes below the title."""
    layout = place([_size(b) for b in drawing.boxes], drawing.edges, 0, drawing.output)
    return "\n".join(_Page(drawing, layout).lines(title, notes))


def _escaped(text: str) -> str:
    return escape(_printable(text))


def _quoted(text: str) -> str:
    return quoteattr(_printable(text))


def _printable(text: str) -> str:
    """XML has no way to write most control characters."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def _short(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest // 2 - 1]}…{text[-(longest // 2) :]}"


def _listed(words: list[str]) -> str:
    """The words, as many as a line takes."""
    text = words[0]
    for word in words[1:]:
        if len(text) + len(word) > LONGEST - 6:
            return f"{text}, ..."
        text += f", {word}"
    return _short(text)


def _lines(box: Box) -> list[tuple[str, str]]:
    """The (class, text) of each line in a box."""
    lines = [("name", _short(box.name))]
    if box.form is Form.COMPONENT:
        counted = list(dict.fromkeys(box.operations))
        if [box.name] != counted:
            lines.append(("small", _listed(counted)))
        if box.abilities:
            lines.append(("small", box.abilities))
        own = [p.removeprefix(f"{box.name}.") for p in box.solved]
        lines.extend(("solved", _short(f"solve {p}")) for p in own)
    return lines


def _size(box: Box) -> tuple[float, float]:
    if box.form in CIRCLES:
        return (2 * RADIUS + 2 * (CHARACTER * len(_short(box.name, 16)) + 6), 2 * RADIUS)
    lines = _lines(box)
    widest = max(len(text) * (8.0 if cls == "name" else CHARACTER) for cls, text in lines)
    return (max(70.0, widest + 22.0), LINE * len(lines) + 14.0)


class _Page:
    """The drawing on its page; SVG's y grows downwards."""

    def __init__(self, drawing: Drawing, layout: Layout) -> None:
        self.drawing, self.layout = drawing, layout
        self.sizes = [_size(b) for b in drawing.boxes]
        used = {b.paint for b in drawing.boxes if b.form is Form.COMPONENT}
        self.paints = [p for p in Paint if p in used]
        self.top = MARGIN + 84.0  # title, and the way out of the block

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return MARGIN + x, self.top + self.layout.height - y

    def lines(self, title: str, notes: list[str]) -> Iterator[str]:
        """The file's lines: the title and notes, the edges under the boxes, and the legend."""
        width = max(self.layout.width, 8.0 * len(title), *(CHARACTER * len(n) for n in notes), 200.0) + 2 * MARGIN
        height = self.top + self.layout.height + LEGEND_ROW * (len(self.paints) + 1) + 2 * MARGIN
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
        )
        yield f"<title>{_escaped('; '.join([title, *notes]))}</title>"
        yield f"<style>{STYLE}</style>"
        yield "<defs>" + _arrow("arrow", PALE) + _arrow("arrow-route", ACCENT) + "</defs>"
        yield '<rect width="100%" height="100%" fill="#ffffff"/>'
        yield f'<text class="name left" x="{MARGIN}" y="{MARGIN:.0f}">{_escaped(title)}</text>'
        for row, note in enumerate(notes, 1):
            yield f'<text class="small left" x="{MARGIN}" y="{MARGIN + 17 * row:.0f}">{_escaped(note)}</text>'
        yield from self._edges()
        for index in range(len(self.drawing.boxes)):
            yield from self._box(index)
        yield from self._legend(self.top + self.layout.height + MARGIN)
        yield "</svg>"

    def _edges(self) -> Iterator[str]:
        arriving: dict[int, list[tuple[int, int]]] = {}
        for edge in self.drawing.edges:
            arriving.setdefault(edge[1], []).append(edge)
        aims = {e: aim for edges in arriving.values() for e, aim in self._ports(edges)}
        for edge in sorted(self.drawing.edges, key=lambda e: e in self.drawing.route_edges):
            yield self._edge(edge, aims[edge])
        x, y = self._at(*self.layout.centres[self.drawing.output])
        y -= self.sizes[self.drawing.output][1] / 2
        yield f'<path class="edge" d="M{x:.1f} {y:.1f}V{y - 24:.1f}" marker-end="url(#arrow)"/>'

    def _ports(self, edges: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], float]]:
        """Where the edges into one box arrive: a straight one in the middle, the others beside it."""
        middle = self.layout.centres[edges[0][1]][0]
        box = self.drawing.boxes[edges[0][1]]
        half = 0.95 * RADIUS if box.form in CIRCLES else 0.3 * self.sizes[edges[0][1]][0]

        def comes_from(edge: tuple[int, int]) -> float:
            lanes = self.layout.lanes[edge]
            return lanes[-1][0] if lanes else self.layout.centres[edge[0]][0]

        ordered = sorted(edges, key=comes_from)
        left = [e for e in ordered if comes_from(e) < middle - 1]
        right = [e for e in ordered if comes_from(e) > middle + 1]
        for side, sign in ((left[::-1], -1.0), (right, 1.0)):
            for rank, edge in enumerate(side, 1):
                alone = len(edges) == 1
                yield edge, middle if alone else middle + sign * half * (0.25 + 0.6 * rank / len(side))
        yield from ((e, middle) for e in ordered if e not in left and e not in right)

    def _edge(self, edge: tuple[int, int], aim: float) -> str:
        """From the top of the lower box, through its lanes, up to `aim` at the lower side of the upper box."""
        lower, upper = edge
        x, y = self._at(self.layout.centres[lower][0], self.layout.centres[lower][1] + self._half(lower, 0.0))
        path, y = f"M{x:.1f} {y:.1f}", self._at(0.0, self.layout.bands[lower][1])[1]
        end = self.layout.centres[upper][1] - self._half(upper, aim - self.layout.centres[upper][0]) - 5
        floor = min(self.layout.bands[upper][0], end) - STRAIGHT
        for lane, low, high in [*self.layout.lanes[edge], (aim, floor, end)]:
            to_x, to_y = self._at(lane, low)
            bend = (y + to_y) / 2
            path += f"V{y:.1f}C{x:.1f} {bend:.1f} {to_x:.1f} {bend:.1f} {to_x:.1f} {to_y:.1f}"
            x, y = to_x, self._at(lane, high)[1]
        on = edge in self.drawing.route_edges
        cls, mark = ("edge route", "arrow-route") if on else ("edge", "arrow")
        ends = " ".join(self.drawing.boxes[i].name for i in edge)
        return f'<path class="{cls}" data-edge={_quoted(ends)} d="{path}V{y:.1f}" marker-end="url(#{mark})"/>'

    def _half(self, index: int, aside: float) -> float:
        """The distance from a box's centre to its rim, straight up or down, so far `aside` of the middle."""
        if self.drawing.boxes[index].form in CIRCLES:
            return max(0.0, RADIUS**2 - aside**2) ** 0.5
        return self.sizes[index][1] / 2

    def _box(self, index: int) -> Iterator[str]:
        box, (width, height) = self.drawing.boxes[index], self.sizes[index]
        x, y = self._at(*self.layout.centres[index])
        cls = "component route" if box.on_route else "component"
        yield f'<g class="{cls}" data-name={_quoted(box.name)} data-nodes={_quoted(" ".join(box.nodes))}>'
        yield f"<title>{_escaped(_tooltip(box))}</title>"
        if box.form in CIRCLES:
            yield f'<circle class="box" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="#ffffff"/>'
            sign = "+" if box.form is Form.SUM else "\N{MULTIPLICATION SIGN}"
            yield f'<text class="name" x="{x:.1f}" y="{y + 4.5:.1f}">{sign}</text>'
            label = _escaped(_short(box.name, 16))
            yield f'<text class="small right" x="{x - RADIUS - 6:.1f}" y="{y + 4:.1f}">{label}</text>'
        else:
            corner = height / 2 if box.form is Form.STREAM else 7
            yield (
                f'<rect class="box" x="{x - width / 2:.1f}" y="{y - height / 2:.1f}" width="{width:.1f}" '
                f'height="{height:.1f}" rx="{corner:.0f}" fill="{FILL[box.paint]}"/>'
            )
            first = y - height / 2 + 7 + LINE * 0.75
            for row, (style, text) in enumerate(_lines(box)):
                yield f'<text class="{style}" x="{x:.1f}" y="{first + LINE * row:.1f}">{_escaped(text)}</text>'
        yield "</g>"

    def _legend(self, y: float) -> Iterator[str]:
        entries = [(FILL[p], PALE, p.value) for p in self.paints] + [("#ffffff", ACCENT, "on the route of the plan")]
        yield '<g class="legend">'
        for row, (fill, stroke, text) in enumerate(entries):
            at = y + row * LEGEND_ROW
            weight = 2.6 if stroke == ACCENT else 1.2
            yield (
                f'<rect x="{MARGIN}" y="{at:.1f}" width="22" height="14" rx="3" fill="{fill}" '
                f'stroke="{stroke}" stroke-width="{weight}"/>'
            )
            yield f'<text class="small left" x="{MARGIN + 30}" y="{at + 11:.1f}">{_escaped(text)}</text>'
        yield "</g>"


def _arrow(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="3" refY="4" markerWidth="9" markerHeight="9" orient="auto" '
        f'markerUnits="userSpaceOnUse"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
    )


def _tooltip(box: Box) -> str:
    return "\n".join([box.name, *box.nodes, *([str(box.controls)] if box.controls else [])])
