"""Patches: what their files carry and refuse, and how they reach a model in memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import HANGS
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import blockkit as bk
from blockkit import Patch
from blockkit.errors import BadInput, MissingDependency
from blockkit.graph.changes import MatrixChange, VectorChange
from blockkit.patch import in_place
from blockkit.patch.file import digest
from blockkit.patch.in_place import ChangedParameter, Receipt

RNG = np.random.default_rng(5)


def matrix(rank: int, out: int = 4, into: int = 3, per_token: bool = False) -> MatrixChange:
    left, right = (RNG.normal(size=(rank, n)).astype(np.float32) for n in (out, into))
    return MatrixChange(left, right, per_token)


def plain(**facts: Any) -> Patch:
    """A patch of two weights for one query of three tokens."""
    changes = {"down.weight": matrix(2), "norm.weight": VectorChange(np.ones(4, np.float32))}
    made_for = {"architecture": "m", "weights": "0"}
    given = Patch(changes, made_for, "stable", "last", 5, (7, 8, 9), "float32", {"linf": 1e-7})
    return replace(given, measured_for="", **facts)


def batched(**facts: Any) -> Patch:
    """A patch for two prompts of three tokens, the second of which is one token shorter."""
    changes = {"down.weight": matrix(2, per_token=True), "up.weight": matrix(6, per_token=True)}
    return plain(changes=changes, batch=2, padding=(0, 1), query=(1, 2, 3, 0, 4, 5), **facts)


# -- files -------------------------------------------------------------------------------------------

ROUND_TRIPS = {
    "plain": plain(),
    "batched": batched(),
    "places of its own": batched(positions=(5, 6, 7, 0, 9, 10)),
    "transposed, and named": plain(transposed=("down.weight",), tensors={"down.weight": "h.0.down.weight"}),
    "no weight is whole": plain(tensors={}),
    "each": plain(changes={"down.weight": matrix(3, per_token=True)}, tokens="each"),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_round_trip_keeps_everything(name: str, tmp_path: Path) -> None:
    patch = ROUND_TRIPS[name]
    patch.save(tmp_path / "p")
    again = Patch.load(tmp_path / "p")
    assert again.source == str(tmp_path / "p")
    for key, value in vars(patch).items():
        if key == "changes":
            for slot, change in value.items():
                assert all(np.array_equal(v, getattr(again.changes[slot], k)) for k, v in vars(change).items())
        elif key != "source":
            assert getattr(again, key) == value, key


def test_positions_count_the_tokens_of_each_prompt() -> None:
    assert plain().position_ids.tolist() == [[5, 6, 7]]
    assert batched().position_ids.tolist() == [[5, 6, 7], [0, 5, 6]]
    assert batched().attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batched().query_ids.tolist() == [[1, 2, 3], [0, 4, 5]]
    placed = batched(positions=(5, 6, 7, 0, 9, 10))
    assert placed.position_ids.tolist() == [[5, 6, 7], [0, 9, 10]]
    assert placed.validity == "exact for the last token of each of 2 queries of up to 3 token(s), at positions 5 to 10"
    assert plain().validity == "exact for the last token of one query of 3 token(s), at positions 5 to 7"


def rewritten(path: Path, facts: Mapping[str, Any], drop: tuple[str, ...] = (), **tensors: np.ndarray) -> Patch:
    """The patch in the file, with some of its facts and tensors replaced, and a digest of them."""
    with safe_open(path, framework="np") as file:
        header = dict(file.metadata())
    found = {k: v for k, v in {**json.loads(header["patch"]), **facts}.items() if k not in drop}
    numbers = tensors or load_file(path)
    header = {**header, "patch": json.dumps(found)}
    save_file(numbers, path, {**header, "sha256": digest(header, numbers)})
    return Patch.load(path)


def as_format_1(path: Path) -> None:
    """Marks the file as one of the first format, without a digest, which it had not at first."""
    with safe_open(path, framework="np") as file:
        header = {**file.metadata(), "format": "blockkit-patch 1"}
    facts = {k: v for k, v in json.loads(header["patch"]).items() if k not in ("measured_for", "floors")}
    save_file(load_file(path), path, {"format": header["format"], "patch": json.dumps(facts)})


def test_a_file_without_the_later_facts_is_read(tmp_path: Path) -> None:
    batched(transposed=("up.weight",), tensors={}).save(tmp_path / "p")
    later = ("batch", "padding", "transposed", "tensors")
    changes = {f"{slot}.each.{side}": np.ones((6, 2), np.float32) for slot in ("down.weight", "up.weight") for side in
               ("left", "right")}  # fmt: skip
    rewritten(tmp_path / "p", {"tokens": "each"}, later, **changes)
    as_format_1(tmp_path / "p")
    old = Patch.load(tmp_path / "p")
    assert (old.batch, old.padding, old.positions, old.transposed, old.tensors) == (1, (), (), (), None)
    assert old.position_ids.tolist() == [[5, 6, 7, 8, 9, 10]]


DAMAGED: dict[str, dict[str, Any]] = {
    "a batch that does not divide the query": {"batch": 4},
    "no prompt at all": {"batch": 0},
    "a batch that is no number": {"batch": True},
    "padding for another number of prompts": {"padding": [1]},
    "nothing but padding": {"padding": [0, 3]},
    "negative padding": {"padding": [0, -1]},
    "too few positions": {"positions": [1, 2]},
    "positions that are no numbers": {"positions": [1.5] * 6},
    "a transposed weight that does not change": {"transposed": ["q.weight"]},
    "a name of what does not change": {"tensors": {"q": "q.weight"}},
    "a name that is none": {"tensors": {"up.weight": 3}},
    "one prompt alone": {"batch": 1, "padding": []},
    "a row for neither a token nor a prompt": {"batch": 3, "padding": []},
    "unknown": {"more": 1},
    "no number": {"query": ["1"] * 6},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_facts_are_refused(name: str, tmp_path: Path) -> None:
    batched().save(tmp_path / "p")
    with pytest.raises(BadInput, match="damaged"):
        rewritten(tmp_path / "p", DAMAGED[name])


def test_a_number_that_was_not_written_is_noticed(tmp_path: Path) -> None:
    batched().save(tmp_path / "p")
    content = bytearray((tmp_path / "p").read_bytes())
    content[-3] ^= 1
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(BadInput, match=r"damaged \(its facts or numbers are not those that were written"):
        Patch.load(tmp_path / "p")


def flipped(path: Path, bits: Iterable[int]) -> Iterator[Patch]:
    """The patches that are read from the file with one bit flipped, as far as any is."""
    content, damaged = path.read_bytes(), path.with_name("flipped")
    for bit in bits:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(changed)
        try:
            yield Patch.load(damaged)
        except BadInput:
            continue


def facts_of(patch: Patch) -> dict[str, Any]:
    """All that a patch holds, to be compared."""
    held = {k: v for k, v in vars(patch).items() if k not in ("source", "changes", "contextual")}
    arrays = {slot: {k: np.asarray(v).tobytes() for k, v in vars(c).items()} for slot, c in patch.changes.items()}
    return {**held, "changes": arrays, "contextual": {k: v.tobytes() for k, v in patch.contextual.items()}}


def test_no_bit_of_a_file_can_change_what_it_says(tmp_path: Path) -> None:
    stream = {"float32": np.ones((1, 4), np.float32)}
    patch = plain(contextual=stream, floors={"float32": 1e-5, "bfloat16": 0.25})
    patch.save(tmp_path / "p")
    wanted, bits = facts_of(Patch.load(tmp_path / "p")), 8 * (tmp_path / "p").stat().st_size
    read = [facts_of(found) for found in flipped(tmp_path / "p", range(bits))]
    assert bits > 7000 and all(found == wanted for found in read)
    assert len(read) <= 32  # blanks that fill the header up may be other blanks


def test_the_same_patch_is_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    plain(floors={"float32": 1e-5}).save(tmp_path / "p")
    code = "import sys; from blockkit import Patch; Patch.load(sys.argv[1]).save(sys.argv[2])"
    for number in range(2):
        again = tmp_path / f"again{number}"
        subprocess.run([sys.executable, "-c", code, tmp_path / "p", again], check=True, timeout=120)
        assert again.read_bytes() == (tmp_path / "p").read_bytes()


def test_a_digest_is_obligatory(tmp_path: Path) -> None:
    plain().save(tmp_path / "p")
    with safe_open(tmp_path / "p", framework="np") as file:
        header = {k: v for k, v in file.metadata().items() if k != "sha256"}
    save_file(load_file(tmp_path / "p"), tmp_path / "p", header)
    with pytest.raises(BadInput, match="damaged"):
        Patch.load(tmp_path / "p")


def test_a_part_of_a_patch_claims_nothing(tmp_path: Path) -> None:
    patch = plain()
    part = replace(patch, changes={"down.weight": patch.changes["down.weight"]})
    part.save(tmp_path / "p")
    for found in (part, Patch.load(tmp_path / "p")):
        assert not found.whole and found.validity.startswith("not proved: other changes were measured, as exact for")
    assert patch.whole and replace(part, changes=patch.changes).whole


STREAMS: dict[str, tuple[dict[str, Any], str]] = {
    "too many rows": ({"contextual": {"float32": np.ones((2, 4), np.float32)}}, "contextual run in 'float32'"),
    "no number": ({"contextual": {"float32": np.full((1, 4), np.nan, np.float32)}}, "contextual run in 'float32'"),
    "an unknown dtype": ({"contextual": {"float8": np.ones((1, 4), np.float32)}}, "contextual run in 'float8'"),
    "of another dtype alone": ({"contextual": {"bfloat16": np.ones((1, 4), np.float32)}}, "without the contextual run"),
    "a floor below zero": ({"floors": {"float32": -1.0}}, "the floor in 'float32'"),
    "a floor of an unknown dtype": ({"floors": {"float8": 1.0}}, "the floor in 'float8'"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_what_no_contextual_run_gives_is_refused(name: str, tmp_path: Path) -> None:
    facts, why = STREAMS[name]
    plain(**facts).save(tmp_path / "p")
    with pytest.raises(BadInput, match=why):
        Patch.load(tmp_path / "p")


@pytest.mark.parametrize("per_token", [False, True])
def test_a_parameter_may_be_called_each(per_token: bool, tmp_path: Path) -> None:
    change = MatrixChange(np.ones((6, 2), np.float32), np.ones((6, 3), np.float32), per_token)
    patch = plain(changes={"blocks.0.each": change}, query=tuple(range(6)), tokens="each" if per_token else "all")
    patch.save(tmp_path / "p")
    assert [(slot, c.per_token) for slot, c in Patch.load(tmp_path / "p").changes.items()] == [
        ("blocks.0.each", per_token)
    ]


def test_a_process_killed_while_saving_loses_nothing(tmp_path: Path) -> None:
    plain().save(tmp_path / "p")
    before = (tmp_path / "p").read_bytes()
    code = """if True:
        import os, pathlib, signal, sys
        from blockkit import Patch
        patch = Patch.load(sys.argv[1])
        pathlib.Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
        patch.save(sys.argv[1])"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "p"], capture_output=True, timeout=HANGS)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "p").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2  # the new one, complete but not yet in place
    plain(strategy="paper").save(tmp_path / "p")
    assert Patch.load(tmp_path / "p").strategy == "paper"


def test_what_is_no_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name, why in (("folder", "not an ordinary file"), ("link", "not an ordinary file"), ("none/p", "cannot write")):
        with pytest.raises(BadInput, match=why):
            plain().save(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "link"]


# -- models in memory --------------------------------------------------------------------------------


class Model:
    """Stands for a model of a framework whose root module is this one."""


class Framework:
    """An in-place backend that keeps a record of what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        x = bk.stream()
        v = x + bk.Attention(bk.RMSNorm(x), heads=2, head_dim=4)
        block = bk.Block(v + bk.GatedMLP(bk.RMSNorm(v), hidden=16), width=8)
        self.found = {"blocks.0": bk.Architecture("a", 8, {"b": block}).graphs["b"]}

    def graphs(self, model: Any, example: Any = None) -> Any:
        self.asked.append(("graphs", example))
        return self.found

    def check(self, patch: Patch, model: Any) -> None:
        self.asked.append("check")

    def apply(self, patch: Patch, model: Any, merge: bool) -> Receipt:
        self.asked.append(("apply", merge))
        return Receipt((), patch.validity)

    def remove(self, patch: Patch, model: Any) -> None:
        self.asked.append("remove")


framework = Framework()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    register(monkeypatch, {Model.__module__: f"{__name__}:framework"})
    framework.asked.clear()
    return framework.asked


def register(monkeypatch: pytest.MonkeyPatch, entries: dict[str, str]) -> None:
    found = [EntryPoint(name, value, in_place.GROUP) for name, value in entries.items()]
    monkeypatch.setattr(in_place, "entry_points", lambda group: found)


def test_a_patch_is_taken_off_however_the_block_ends(asked: list[Any]) -> None:
    model = Model()
    with plain().applied(model) as receipt:
        assert asked == [("apply", True)] and receipt.validity == plain().validity
    assert asked == [("apply", True), "remove"]
    with pytest.raises(ZeroDivisionError), plain().applied(model, merge=False):
        raise ZeroDivisionError
    assert asked[2:] == [("apply", False), "remove"]


def test_a_patch_that_is_not_on_is_not_taken_off(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise BadInput("another model's")

    monkeypatch.setattr(framework, "apply", refuse)
    with pytest.raises(BadInput, match="another model's"), plain().applied(Model()):
        raise AssertionError("the block must not run")
    assert asked == []


@pytest.mark.parametrize("patch", [ROUND_TRIPS["each"], batched()])
def test_what_has_no_merged_form_stays_factored(asked: list[Any], patch: Patch) -> None:
    with pytest.raises(BadInput, match="cannot be merged"):
        patch.apply(Model(), merge=True)
    assert asked == []
    patch.apply(Model())
    assert asked == [("apply", False)]


def test_the_backend_is_that_of_the_most_derived_class(monkeypatch: pytest.MonkeyPatch) -> None:
    derived = type("Derived", (Model,), {"__module__": "above.models"})
    register(monkeypatch, {Model.__module__: f"{__name__}:framework"})
    assert in_place.backend_of(derived()) is framework
    register(monkeypatch, {Model.__module__: f"{__name__}:framework", "above": f"{__name__}:RNG"})
    assert in_place.backend_of(derived()) is RNG  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("model", [None, 5, [Model], print])
def test_what_is_no_model(asked: list[Any], model: Any) -> None:
    for ask in (bk.check, bk.plan, bk.explain, plain().apply, plain().remove):
        with pytest.raises(BadInput, match=f"no model of a framework that blockkit knows \\({Model.__module__}\\)"):
            ask(model)


def test_a_backend_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, {Model.__module__: "no_such_module_at_all:it"})
    with pytest.raises(MissingDependency, match="no_such_module_at_all"):
        plain().apply(Model())


def test_a_model_in_memory_is_judged_and_planned(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, plan = bk.check(Model(), tokens=1), bk.plan(Model(), example=(1, 2))
    assert verdict.patchable and plan.steps
    assert bk.explain(Model(), only=["*.up_proj"], tokens=99).verdict.patchable is False
    assert asked == [("graphs", None), ("graphs", (1, 2)), ("graphs", None)]
    graph = framework.found["blocks.0"]
    monkeypatch.setattr(framework, "found", {"blocks.0": graph, "blocks.1": graph.restricted(freeze=["*"])})
    assert bk.check(Model()).patchable is False


def test_specs_and_models_are_told_apart(asked: list[Any]) -> None:
    with pytest.raises(BadInput, match="an example is what a model in memory is called with"):
        bk.check("gemma3-270m", example=1)
    with pytest.raises(BadInput, match=r"a Model is no spec; .* goes to check, explain or plan"):
        bk.load(Model())  # type: ignore[arg-type]


def test_a_receipt_says_what_became_of_each_parameter() -> None:
    one = ChangedParameter("layers.0.down.weight", (4, 3), "bfloat16", "merged", 0.25, 1.5, 0.0)
    receipt = Receipt((one, replace(one, name="norm.weight", shape=(4,), residual=1e-3)), "exact for x")
    assert not receipt.exact and Receipt((one,), "").exact and not Receipt((one,), "", proved=False).exact
    first, *rows = str(receipt).splitlines()
    assert first == "2 changed parameter(s); exact for x" and rows[0].startswith("parameter ")
    assert rows[1].split("  ")[0] == "layers.0.down.weight" and "4 x 3" in rows[1] and "as meant" in rows[1]
    assert rows[2].endswith("off by 0.001")
