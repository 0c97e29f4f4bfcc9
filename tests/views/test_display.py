"""What a person sees of objects: a short `repr`, HTML and SVG that are well-formed whatever the names are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import blockkit as bk
from blockkit.api import distinct_graphs
from blockkit.display import MOST_ROWS, figure, table
from blockkit.errors import BadInput
from blockkit.graph.changes import MatrixChange, VectorChange
from blockkit.patch.in_place import Receipt

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert('&')</script>"
CATALOGUE = ("gemma3-270m", "switch", "universal-transformer")


def a_patch(layers: int = 18) -> bk.Patch:
    """A patch as large as that of a real model: its factors once printed 442,143 characters."""
    rng = np.random.default_rng(0)
    changes = {
        f"layers.{i}.mlp.down_proj": MatrixChange(*(rng.normal(size=(4, n)).astype("f4") for n in (640, 2048)))
        for i in range(layers)
    } | {f"layers.{i}.norm.scale": VectorChange(np.ones(640, "f4")) for i in range(layers)}
    return bk.Patch(changes, {"architecture": "m"}, "stable", "last", 60, (1, 2, 3), "float32", {"linf": 1e-6})


def things() -> list[Any]:
    found: list[Any] = [a_patch(), a_patch().table(), Receipt((), "exact")]
    for name in CATALOGUE:
        found += [bk.load(name), bk.check(name), bk.explain(name), bk.compare(name, "llama")]
        found += [next(iter(bk.load(name).blocks.values())), *distinct_graphs(name).values(), bk.draw(name)]
    return [*found, bk.plan("switch"), bk.verify("gemma3"), bk.controls(bk.MLP(bk.stream(), hidden=8))]


@pytest.mark.parametrize("thing", things(), ids=lambda t: type(t).__name__)
def test_a_repr_is_short_and_names_its_type(thing: Any) -> None:
    assert len(repr(thing)) < 500 and "\n" not in repr(thing)
    assert repr(thing).startswith(f"<{type(thing).__name__}: ")


@pytest.mark.parametrize("thing", things(), ids=lambda t: type(t).__name__)
def test_what_a_notebook_shows_is_well_formed(thing: Any) -> None:
    if hasattr(thing, "_repr_html_"):
        ElementTree.fromstring(f"<body>{thing._repr_html_()}</body>")
    if hasattr(thing, "_repr_svg_"):
        assert ElementTree.fromstring(thing._repr_svg_()).tag == f"{SVG}svg"


def test_reprs_word_for_word() -> None:
    assert repr(bk.check("gemma3-270m")) == "<Verdict: patchable, one static patch serves up to 1024 token(s)>"
    assert repr(bk.plan("gemma3-270m")) == "<Plan: strategy stable: 3328 numbers stored for a block>"
    assert repr(bk.load("gemma3-270m")) == "<Architecture: gemma3-270m, width 640, 18 layers, blocks local, global>"
    text = "36 changed parameter(s), stable; exact for the last token of one query of 3 token(s), at positions 60 to 62"
    assert repr(a_patch()) == f"<Patch: {text}, linf 1e-06>"


def test_a_subclass_of_the_patch_is_as_short() -> None:
    torch_patch = pytest.importorskip("blockkit.backends.pytorch").Patch
    core = a_patch()
    made = torch_patch(**{name: getattr(core, name) for name in core.__dataclass_fields__})
    assert repr(made).startswith("<TorchPatch: 36 changed") and len(repr(made)) < 500


def test_text_in_html_is_escaped_and_long_tables_say_what_is_left_out() -> None:
    shown = table(HOSTILE, (HOSTILE,), [(HOSTILE,)] * (MOST_ROWS + 3), [HOSTILE])
    assert HOSTILE not in shown and "and 3 more" in shown
    hostile = replace(bk.load("gemma3"), name=HOSTILE, note=HOSTILE)
    assert "<script" not in hostile._repr_html_() + bk.draw(hostile).svg


def test_all_kinds_of_blocks_are_shown() -> None:
    plan = bk.plan("switch")
    assert [p.blocks for p in plan.all] == [("dense",), ("sparse",)]
    assert all(
        f"for a block of kind {kind}" in text
        for text in (str(plan), plan._repr_html_())
        for kind in ("dense", "sparse")
    )
    assert bk.plan("switch", block="sparse").blocks == ("sparse",) and not bk.plan("switch", block="sparse").others
    with pytest.raises(BadInput, match="no kind of block 'nope'; there are dense, sparse"):
        bk.plan("switch", block="nope")
    with pytest.raises(bk.NotPatchable, match=r"^dense: strategy .paper. has no route"):
        bk.plan("switch", strategy="paper", freeze="*")


def test_a_picture_is_saved(tmp_path: Path) -> None:
    picture = bk.draw("gemma3", strategy="paper")
    assert picture.save(tmp_path / "a.svg").read_text() == picture.svg == picture._repr_svg_()
    assert picture.save(tmp_path / "a.mmd").read_text().startswith("flowchart")
    assert "strategy paper" in picture.svg and "strategy stable" in bk.draw(bk.plan("gemma3")).svg
    with pytest.raises(BadInput, match=r"must end in \.svg or \.mmd"):
        picture.save(tmp_path / "a.png")


def test_what_has_no_plan_is_drawn_without_a_route(tmp_path: Path) -> None:
    picture = bk.draw("universal-transformer")
    assert picture.plan is None and "no route" in picture.svg and "solve " not in picture.svg
    with pytest.raises(BadInput, match=r"has none; save it as \.svg"):
        picture.save(tmp_path / "a.mmd")
    with pytest.raises(BadInput, match="unknown strategy"):
        bk.draw("gemma3", strategy="none")
    with pytest.raises(BadInput, match="no kind of block"):
        bk.draw("gemma3", block="nope")


def test_a_block_that_is_not_finished_shows_as_text() -> None:
    unfinished = bk.Block(bk.Linear(bk.stream(), out=3), width=4)
    assert unfinished._repr_svg_() is None and "Block" in repr(unfinished)


def test_only_what_has_a_plot_is_plotted() -> None:
    with pytest.raises(TypeError, match="no plot of a int"):
        figure(3)


@pytest.mark.parametrize("glob", ["mlp.*", "*.o_proj"])
def test_one_glob_may_stand_without_a_list(glob: str) -> None:
    assert bk.check("gemma3", only=glob) == bk.check("gemma3", only=[glob])
    assert bk.check("gemma3", freeze=glob) == bk.check("gemma3", freeze=[glob])
    assert str(bk.compare("gemma3", "llama", only=glob)) == str(bk.compare("gemma3", "llama", only=[glob]))
    assert str(bk.verify("gemma3", freeze=glob)) == str(bk.verify("gemma3", freeze=[glob]))
    x = bk.stream()
    out = x + bk.MLP(bk.Attention(x, heads=1, head_dim=4, name="a"), hidden=8, name="mlp")
    assert bk.Block(out, width=4, tied="mlp.*") == bk.Block(out, width=4, tied=("mlp.*",))
    for wrong in (3, [3]):
        with pytest.raises(BadInput, match="only must be a list of globs"):
            bk.check("gemma3", only=wrong)
