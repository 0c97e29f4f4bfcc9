"""Drawings and documents: well-formed, nothing overlaps, the whole route is shown, whatever the names are."""

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from processes import HANGS
from typer.testing import CliRunner

import blockkit as bk
from blockkit.cli.commands import app
from blockkit.errors import BadInput
from blockkit.graph.graph import Graph, Node, Parameter
from blockkit.graph.ops import Activation, Add, LayerNorm, MatMul, Mix, Multiply, Op, RMSNorm, Slice, Softcap
from blockkit.graph.sizes import Size
from blockkit.planner.plan import Plan, make_plan
from blockkit.views import drawing
from blockkit.views.drawing import Form, Paint, draw
from blockkit.views.latex import latex
from blockkit.views.mermaid import mermaid
from blockkit.views.svg import svg

SVG = "{http://www.w3.org/2000/svg}"
TANGLED: dict[str, tuple[Op, str]] = {
    "a": (Mix(), "x"), "b": (Mix(), "x a"), "v": (Add(), "x a"), "w": (Add(), "v b x"), "z": (RMSNorm(), "w"),
    "h": (MatMul(), "z W1"), "k": (MatMul(), "z W3"), "gate": (Activation("silu"), "k"), "p": (Multiply(), "h gate"),
    "f": (MatMul(), "p W2"), "s": (Multiply(), "f m"), "late": (Activation("tanh"), "w"), "r": (Multiply(), "s late"),
    "y": (Add(), "w r x"),
}  # fmt: skip
SHAPES = {"W1": (10, 4), "W2": (4, 10), "W3": (10, 4), "m": (4,)}
HOSTILE = "b_1^2{}%&#$~\\ <i>\"'|`é"


def raw(nodes: dict[str, tuple[Op, str]], shapes: dict[str, tuple[int, ...]], rename: str = "") -> Graph:
    stored = [Parameter(n + rename, tuple(map(Size.of, s))) for n, s in shapes.items()]
    listed = [Node(n + rename, op, tuple(a + rename for a in args.split())) for n, (op, args) in nodes.items()]
    return Graph.build("x" + rename, "y" + rename, Size.of(4), stored, listed)


PLANS: dict[str, Plan] = {
    "llama": bk.plan("llama", "paper"),
    "gemma3": bk.plan("gemma3", "stable"),
    "gpt2": bk.plan("gpt2", "minimal"),
    "vanilla": bk.plan("vanilla", "matrix"),
    "parallel": bk.plan("examples/parallel.yaml", "joint"),
    "tangled": make_plan(raw(TANGLED, SHAPES), "minimal"),
    "hostile names": make_plan(raw(TANGLED, SHAPES, HOSTILE), "minimal"),
}
each = pytest.mark.parametrize("name", PLANS)


def components(page: str) -> list[ElementTree.Element]:
    return [g for g in ElementTree.fromstring(page).iter(f"{SVG}g") if "data-name" in g.attrib]


def corners(group: ElementTree.Element) -> tuple[float, float, float, float]:
    rect, circle = group.find(f"{SVG}rect"), group.find(f"{SVG}circle")
    if rect is not None:
        x, y, width, height = (float(rect.attrib[k]) for k in ("x", "y", "width", "height"))
        return x, y, x + width, y + height
    assert circle is not None
    x, y, r = (float(circle.attrib[k]) for k in ("cx", "cy", "r"))
    return x - r, y - r, x + r, y + r


def points(path: str) -> Iterator[tuple[float, float]]:
    """Points along a path of M, V and C, close enough to each other to see what it crosses."""
    x = y = 0.0
    for command, text in re.findall(r"([MVC])([-\d. ]+)", path):
        numbers = [float(t) for t in text.split()]
        if command == "M":
            x, y = numbers
            continue
        ends = [x, y, x, y, x, numbers[0], x, numbers[0]] if command == "V" else [x, y, *numbers]
        for i in range(33):
            t, s = i / 32, 1 - i / 32
            weights = (s**3, 3 * s * s * t, 3 * s * t * t, t**3)
            yield tuple(sum(w * ends[2 * k + axis] for k, w in enumerate(weights)) for axis in (0, 1))  # type: ignore[misc]
        x, y = ends[-2:]


@each
def test_boxes_do_not_overlap_and_stay_on_the_page(name: str) -> None:
    page = svg(PLANS[name], name)
    root = ElementTree.fromstring(page)
    boxes = [corners(g) for g in components(page)]
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert all(x0 >= 0 and x1 <= width and y0 >= 0 and y1 <= height for x0, y0, x1, y1 in boxes)


def test_the_stream_runs_straight_up_on_the_left() -> None:
    middles = {g.attrib["data-name"]: sum(corners(g)[::2]) / 2 for g in components(svg(PLANS["gemma3"]))}
    assert middles["x"] == middles["v"] == middles["y"] == min(middles.values())


@each
def test_edges_run_around_boxes_and_upwards(name: str) -> None:
    page = svg(PLANS[name], name)
    boxes = [corners(g) for g in components(page)]
    paths = [p for p in ElementTree.fromstring(page).iter(f"{SVG}path") if "data-edge" in p.attrib]
    assert len(paths) == len(draw(PLANS[name].graph).edges)
    for path in paths:
        along = list(points(path.attrib["d"]))
        assert all(later[1] <= earlier[1] + 1e-6 for earlier, later in pairwise(along))
        for (x0, y0, x1, y1), group in zip(boxes, components(page), strict=True):
            inside = [(x, y) for x, y in along if x0 + 1 < x < x1 - 1 and y0 + 1 < y < y1 - 1]
            if group.find(f"{SVG}circle") is not None:  # the corners of its square are outside
                radius, centre = (x1 - x0) / 2, ((x0 + x1) / 2, (y0 + y1) / 2)
                inside = [p for p in inside if math.dist(p, centre) < radius - 1]
            assert not inside


@each
def test_the_whole_route_is_highlighted_and_nothing_else(name: str) -> None:
    plan = PLANS[name]
    passed = {link.node for step in plan.route.steps for link in step.path}
    shown = draw(plan.graph, plan.route)
    assert {n for box in shown.boxes for n in box.nodes} == set(plan.graph.relevant)
    for box in shown.boxes:
        assert box.on_route == bool(passed & set(box.nodes))
    assert sorted(p for box in shown.boxes for p in box.solved) == sorted(set(plan.route.parameters))
    marked = [g for g in components(svg(plan)) if "route" in g.attrib["class"].split()]
    assert len(marked) == sum(box.on_route for box in shown.boxes) > 0
    assert len(re.findall("==>", mermaid(plan))) == len(shown.route_edges)


def test_colours_follow_from_the_derived_controls() -> None:
    paints = {box.name: box.paint for box in draw(PLANS["gemma3"].graph).boxes}
    assert paints["attention"] is Paint.MIXING and paints["mlp"] is Paint.BOTH and paints["x"] is Paint.STREAM
    x = bk.stream()
    v = x + bk.Attention(x, heads=2, head_dim=2, name="attention")
    bounded = bk.Block(v + bk.RMSNorm(bk.MLP(v, hidden=8, name="mlp"), scale=False, name="norm"), width=4).graph()
    assert {b.name: b.paint for b in draw(bounded).boxes}["norm"] is Paint.NEITHER
    one_way: dict[str, tuple[Op, str]] = {
        "a": (Mix(), "x"), "v": (Add(), "x a"), "m.h": (MatMul(), "v W"), "m.c": (Softcap(2.0), "m.h"),
        "y": (Add(), "v m.c"),
    }  # fmt: skip
    assert {b.name: b.paint for b in draw(raw(one_way, {"W": (4, 4)})).boxes}["m"] is Paint.INPUT


def test_nodes_that_cannot_share_a_box_get_one_each() -> None:
    nodes: dict[str, tuple[Op, str]] = {
        "m.a": (Mix(), "x"), "b": (Add(), "x m.a"), "m.c": (LayerNorm(), "b"), "y": (Add(), "b m.c w"),
    }  # fmt: skip
    assert [box.name for box in draw(raw(nodes, {"w": (4,)})).boxes] == ["x", "m.a", "b", "m.c", "y"]
    assert draw(raw(nodes, {"w": (4,)})).boxes[2].form is Form.SUM


def test_too_large_a_drawing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "MOST_BOXES", 5)
    with pytest.raises(BadInput, match="the block has 14 components; a drawing shows up to 5"):
        svg(PLANS["tangled"])


@each
def test_mermaid_declares_what_it_joins_and_escapes_names(name: str) -> None:
    lines = [line.strip() for line in mermaid(PLANS[name]).splitlines()]
    assert lines[0] == "flowchart BT"
    declared = {m[1] for line in lines if (m := re.match(r'(n\d+)(\(\["|\(\("|\[")', line))}
    joined = [m.groups() for line in lines if (m := re.fullmatch(r"(n\d+) (?:-->|==>) (n\d+)", line))]
    assert joined and {end for pair in joined for end in pair} == declared
    for line in lines:
        if (text := re.fullmatch(r'n\d+[\[(]+"(.*)"[\])]+(:::\w+)?', line)) is not None:
            assert '"' not in text[1] and not re.search(r"<(?!/?b>|br/>)", text[1])


def balanced(text: str) -> None:
    """Braces, dollars and environments match, outside escapes."""
    plain = re.sub(r"\\[\\{}$%&#_]", "", text)
    depth = 0
    for c in plain:
        depth += (c == "{") - (c == "}")
        assert depth >= 0
    assert depth == 0 and plain.count("$") % 2 == 0
    stack: list[str] = []
    for kind, environment in re.findall(r"\\(begin|end)\{([\w*]+)\}", text):
        if kind == "begin":
            stack.append(environment)
        else:
            assert stack.pop() == environment
    assert not stack and text.count(r"\left") == text.count(r"\right")


@each
def test_latex_is_balanced_and_complete(name: str) -> None:
    text = latex(PLANS[name], name)
    balanced(text)
    assert text.isascii() and text.count(r"\section*{Step ") == len(PLANS[name].steps)
    assert set(re.findall(r"\\usepackage(?:\[.*\])?\{(\w+)\}", text)) == {"amsmath"}
    with pytest.raises(AssertionError):
        balanced(text.replace("}", "", 1))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
@each
def test_latex_compiles_without_overfull_lines(name: str, tmp_path: Path) -> None:
    (tmp_path / "plan.tex").write_text(latex(PLANS[name], name))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "plan.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=HANGS)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout


def test_plan_prints_one_form_at_a_time() -> None:
    code, page = run("plan", "gpt2", "--svg")
    assert code == 0 and ElementTree.fromstring(page).tag == f"{SVG}svg"
    code, text = run("plan", "gpt2", "--mermaid", "--json")
    found = json.loads(text)
    assert code == 0 and found["mermaid"].startswith("flowchart") and found["strategy"] == "stable"
    assert run("plan", "gpt2", "--latex")[1].startswith(r"\documentclass{article}")
    assert "rule 1 of steer" in run("plan", "gpt2", "--explain")[1]
    with pytest.raises(BadInput, match="--latex and --svg exclude each other"):
        CliRunner().invoke(app, ["plan", "gpt2", "--svg", "--latex"], catch_exceptions=False)


def test_slices_and_unknown_operations_have_equations() -> None:
    nodes: dict[str, tuple[Op, str]] = {
        "a": (Mix(), "x"), "h": (MatMul(), "a W"), "s": (Slice(Size.of(1), Size.of(5)), "h"), "y": (Add(), "x s"),
    }  # fmt: skip
    text = latex(make_plan(raw(nodes, {"W": (9, 4)}), "stable"))
    balanced(text)
    assert r"\operatorname{slice}" in text


def test_a_name_gives_mermaid_no_orders() -> None:
    name = "%%{init: {'theme': 'x'}}%%;click"
    nodes: dict[str, tuple[Op, str]] = {"m": (Mix(), "x"), name: (MatMul(), "m W")}
    graph = Graph.build("x", name, Size.of(4), [Parameter("W", (Size.of(4), Size.of(4)))],
                        [Node(n, op, tuple(args.split())) for n, (op, args) in nodes.items()])  # fmt: skip
    text = mermaid(make_plan(graph, "stable"))
    assert "#37;#37;{init" in text and "#59;click" in text and "%%" not in text and "'" not in text
