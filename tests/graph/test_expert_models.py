"""Whole models with experts: a context absorbed, written, and run by their own class."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import expert_checks as checks
import numpy as np
import pytest
from expert_checks import KINDS
from processes import SMALL_MODELS, python

from blockkit.absorbing import algorithm
from blockkit.absorbing.algorithm import Absorbed
from blockkit.absorbing.executor import reference
from blockkit.absorbing.measure import Reference, measure
from blockkit.absorbing.metrics import compare
from blockkit.absorbing.request import Request
from blockkit.checkpoint.model import Model, open_model
from blockkit.graph.changes import MatrixChange
from blockkit.patch.patch import Patch

TINY: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 10, "max_position_embeddings": 64, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # an expert is narrower than the heads together: the cheapest route
    "mixtral": ("mixtral", {**TINY, "num_local_experts": 5, "intermediate_size": 14, "sliding_window": 9}),
    "qwen3-moe": (
        "qwen3_moe",
        {**TINY, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "norm_topk_prob": True},
    ),
}
IDS = np.random.default_rng(3).integers(0, 61, 12)
EXPERT = {"mixtral": ".block_sparse_moe.experts.{}.w2.weight", "qwen3-moe": ".mlp.experts.{}.down_proj.weight"}


@dataclass
class Whole:
    """A tiny random checkpoint of a class of transformers."""

    name: str
    path: Path

    @cached_property
    def model(self) -> Model:
        families = pytest.importorskip("families")
        families.make(self.path, *MODELS[self.name])
        return open_model(self.path)

    def logits(self, path: Path, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        import families

        theirs = families.loaded(MODELS[self.name][0], path)
        found: np.ndarray = families.logits_of_class(theirs, ids, positions)
        return found

    def absorbed(self, tokens: str, strategy: str | None) -> tuple[Absorbed, Reference]:
        executor = reference(self.model, "float32")
        found = algorithm.absorb(executor, Request(IDS[:8], IDS[8:], tokens), strategy)
        return found, measure(executor, found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    made = {name: Whole(name, tmp_path_factory.mktemp("experts") / name) for name in MODELS}
    return made.__getitem__


@pytest.mark.parametrize("strategy", [None, "paper", "minimal", "matrix"])
@pytest.mark.parametrize("tokens", ["last", "each", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_a_context_is_absorbed(name: str, tokens: str, strategy: str | None, whole: Callable[[str], Whole]) -> None:
    absorbed, measured = whole(name).absorbed(tokens, strategy)
    print(f"\n{absorbed.measured.linf / measured.floor.linf:.3g} x floor")
    assert absorbed.measured.linf <= 10 * measured.floor.linf
    assert measured.unpatched.linf >= 1000 * measured.floor.linf


@pytest.mark.parametrize("tokens", ["last", "all"])
@pytest.mark.parametrize("strategy", ["minimal", "paper"])
@pytest.mark.parametrize("name", MODELS)
def test_the_class_runs_the_written_checkpoint(
    name: str, strategy: str, tokens: str, whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    """Tensors of experts that did not change are the same bits; the others are where the class reads them."""
    mine, out = whole(name), tmp_path / "edited"
    absorbed, measured = mine.absorbed(tokens, strategy)
    patch = Patch.of(absorbed, mine.model, "float32")
    patch.merge_into(mine.model, out)
    one_expert = (strategy, tokens) == ("minimal", "last")
    assert changed_tensors(mine.model, open_model(out)) == expected_tensors(mine, patch)
    if one_expert:
        assert len(expected_tensors(mine, patch)) == 2  # one a layer
    served = absorbed.request.served
    wanted = mine.logits(mine.path, IDS, np.arange(12))[8:][served]
    found = mine.logits(out, IDS[8:], absorbed.request.positions)[served]
    unpatched = mine.logits(mine.path, IDS[8:], absorbed.request.positions)[served]
    print(f"\n{compare(found, wanted).linf / measured.floor.linf:.3g} x floor")
    assert compare(found, wanted).linf <= 10 * measured.floor.linf
    assert compare(unpatched, wanted).linf >= 1000 * measured.floor.linf


def changed_tensors(before: Model, after: Model) -> set[str]:
    """The tensors that are not the same bits in both folders."""
    assert before.folder.shapes == after.folder.shapes
    stored = {name: (before.folder.tensor(name), after.folder.tensor(name)) for name in before.folder.shapes}
    return {name for name, (a, b) in stored.items() if a.tobytes() != b.tobytes()}


def expected_tensors(mine: Whole, patch: Patch) -> set[str]:
    """Those that the patch's own factors reach."""
    found: set[str] = set()
    for slot, change in patch.changes.items():
        tensors = mine.model.parts[slot].tensors
        assert isinstance(change, MatrixChange)
        if slot.endswith("mlp.down_proj"):
            reached = [bool(part.any()) for part in np.split(np.asarray(change.right), len(tensors), axis=1)]
            layer = slot.split(".")[1]
            names = [f"model.layers.{layer}" + EXPERT[mine.name].format(e) for e in range(len(tensors))]
            found.update(n for n, r in zip(names, reached, strict=True) if r)
        else:
            found.update(tensors)
    return found


def test_on_keras_with_jax(whole: Callable[[str], Whole], tmp_path: Path) -> None:
    """Every kind's forward in float32, compiled; a context absorbed into one expert a layer for each token."""
    for module in ("keras", "jax"):
        pytest.importorskip(module)
    mine = whole("qwen3-moe")
    assert mine.model.folder.path == mine.path
    script = str(Path(checks.__file__))
    out = python(script, mine.path, home=tmp_path, KERAS_BACKEND="jax", **SMALL_MODELS)
    found = json.loads(out.splitlines()[-1])
    assert found["forward"].keys() == KINDS.keys()
    assert max(found["forward"].values()) <= 1e-5, found["forward"]
    absorbed = found["absorbed"]
    assert (absorbed["parameters"], absorbed["experts"]) == (["mlp.down_proj"], 1)
    assert absorbed["linf"] <= 10 * absorbed["floor"]
    assert absorbed["unpatched"] >= 1000 * absorbed["floor"]
