"""What a patch changes, by layer: the numbers of its table, its parts, and what is claimed of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from conformance import tiny_model

import blockkit as bk
from blockkit.absorbing.algorithm import absorb
from blockkit.absorbing.backends import open_executor
from blockkit.absorbing.request import Request
from blockkit.checkpoint.model import Model, open_model
from blockkit.errors import BadInput
from blockkit.graph.changes import MatrixChange, VectorChange, dense
from blockkit.views.patch_plot import write_patch_plot

RNG = np.random.default_rng(3)


def drawn(rank: int, out: int = 5, into: int = 7, per_token: bool = False) -> MatrixChange:
    return MatrixChange(RNG.normal(size=(rank, out)), RNG.normal(size=(rank, into)), per_token)


def made(changes: dict[str, Any]) -> bk.Patch:
    return bk.Patch(changes, {"architecture": "m"}, "stable", "last", 5, (7, 8, 9), "float64", {"linf": 1e-9})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama", folder)
    return open_model(folder)


@pytest.fixture(scope="module")
def patch(model: Model) -> bk.Patch:
    absorbed = absorb(open_executor(model, "numpy"), Request(np.arange(1, 6), np.arange(6, 9), "all"))
    return bk.Patch.of(absorbed, model, "float32")


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_norms_are_those_of_the_dense_change(rank: int) -> None:
    change = drawn(rank)
    (row,) = made({"layers.2.w": change}).table()
    whole = dense(np.zeros((5, 7)), change)
    terms = sum(np.linalg.norm(a) * np.linalg.norm(b) for a, b in zip(change.left, change.right, strict=True))
    assert row.norm == pytest.approx(np.linalg.norm(whole), rel=1e-12)
    assert row.amplification == pytest.approx(terms / np.linalg.norm(whole), rel=1e-12)
    assert (row.layer, row.parameter, row.shape, row.rank) == (2, "layers.*.w", (5, 7), rank)


def test_terms_that_cancel_show_as_amplification() -> None:
    left, right = RNG.normal(size=5), RNG.normal(size=7)
    tiny = 1e-9 * RNG.normal(size=5)
    (row,) = made({"w": MatrixChange(np.stack([left, tiny - left]), np.stack([right, right]))}).table()
    assert row.amplification == pytest.approx(2 * np.linalg.norm(left) / np.linalg.norm(tiny), rel=1e-5)


def test_nothing_is_divided_by_a_change_that_is_zero() -> None:
    zero = MatrixChange(np.zeros((2, 5)), np.ones((2, 7)))
    none = MatrixChange(np.zeros((0, 5)), np.zeros((0, 7)))
    for change in (zero, none):
        (row,) = made({"w": change}).table()
        assert row.norm == 0 and row.amplification is None


def test_vectors_and_changes_for_each_token() -> None:
    each, shift = drawn(3, per_token=True), VectorChange(np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]]), True)
    one, two = replace(made({"w": each, "b": shift}), tokens="each").table()
    norms = [np.linalg.norm(np.outer(a, b)) for a, b in zip(each.left, each.right, strict=True)]
    assert (
        one.rank == 1
        and one.norm == pytest.approx(max(norms))
        and one.per_token
        and "1 a token" in str(made({"w": each}).table())
    )
    assert (two.rank, two.norm, two.shape, two.amplification) == (None, 5.0, (2,), None)


@pytest.mark.parametrize(
    ("slot", "layer"),
    [
        ("layers.3.mlp.down_proj", 3), ("model.layers.12.mlp.experts.5.down.weight", 12), ("norm.weight", None),
        ("encoder/decoder_block_4/attention/kernel", 4), ("conv1d.weight", None), ("experts[7]", None),
    ],
)  # fmt: skip
def test_the_layer_is_the_first_number_in_the_name(slot: str, layer: int | None) -> None:
    (row,) = made({slot: drawn(1)}).table()
    assert row.layer == layer and row.slot == slot


def test_a_part_claims_nothing_and_knows_its_model(patch: bk.Patch, model: Model, tmp_path: Path) -> None:
    assert len(patch.changes) > 1 and patch.validity.startswith("exact for")
    part = patch.subset(layers=1)
    assert all(slot.startswith("layers.1.") for slot in part.changes) and part.changes
    assert part.validity == f"not proved: other changes were measured, as {patch.validity}"
    assert part.measured == {} and not part.whole and all("not proved" in s for s in (repr(part), part._repr_html_()))
    part.check(model)
    part.save(tmp_path / "part.safetensors")
    again = bk.Patch.load(tmp_path / "part.safetensors")
    again.check(model)
    assert again.validity == part.validity and list(again.changes) == list(part.changes)
    assert "not proved" in again.merge_into(model, tmp_path / "out").validity
    assert patch.subset(layers=range(3)) is patch


def test_a_part_of_a_part_is_a_part_of_the_whole() -> None:
    whole = made({f"layers.{i}.{p}": drawn(1) for i in range(3) for p in ("down", "up")})
    part = whole.subset([0, 2]).subset(parameters="*.up")
    assert list(part.changes) == ["layers.0.up", "layers.2.up"] and part.measured_for == whole.measured_for


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": 9}, r"layers holds 9; the patch changes 0, 1"),
        ({"layers": "1"}, "layers holds '1'"),
        ({"layers": True}, "layers holds True"),
        ({"layers": 1.0}, r"layers holds 1\.0"),
        ({"parameters": "*.nope"}, "matches none of the changes; there are layers.0.a"),
        ({"layers": 0, "parameters": "*.b"}, "no change is in those layers"),
        ({"layers": ()}, "no change is in those layers"),
        ({"parameters": 3}, "parameters must be a list of globs"),
    ],
)
def test_parts_that_there_are_not(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        made({"layers.0.a": drawn(1), "layers.1.b": drawn(1)}).subset(**asked)


def test_a_plot_has_a_line_for_each_parameter(patch: bk.Patch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    above, _ = patch.plot().axes
    assert [line.get_label() for line in above.lines] == list(dict.fromkeys(r.parameter for r in patch.table()))
    assert sum(len(line.get_xdata()) for line in above.lines) == len(patch.changes)
    write_patch_plot(patch, tmp_path / "plot.svg")
    ElementTree.parse(tmp_path / "plot.svg")
    with pytest.raises(BadInput, match="must end in"):
        write_patch_plot(patch, tmp_path / "plot.txt")
