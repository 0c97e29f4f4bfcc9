"""The catalogue's rules for tensors and numbers: what they read, what they write, and what they refuse."""

from typing import Any

import numpy as np
import pytest

from blockkit.checkpoint.formula import evaluated
from blockkit.checkpoint.tensor_rules import Part, part_of
from blockkit.errors import BadInput

E, F, D = 3, 4, 5  # experts, their hidden width, the stream's width
NAMES = {"experts": E, "f": F, "d": D}
GATE_UP = np.random.default_rng(0).normal(size=(E, 2 * F, D))
PAIRED = np.random.default_rng(1).normal(size=(E, D, 2 * F))  # gate and up in turns, and biases likewise
DOWN = np.random.default_rng(2).normal(size=(E, D, F))
EACH = [np.random.default_rng(3 + e).normal(size=(F, D)) for e in range(E)]

# what -> (rule, slot's shape, stored tensors, the slot's values)
RULES: dict[str, tuple[Any, tuple[int, ...], list[np.ndarray], np.ndarray]] = {
    "as it is": ("w", (F, D), [EACH[0]], EACH[0]),
    "transposed": ({"tensor": "w", "transpose": True}, (D, F), [EACH[0]], EACH[0].T),
    "one row": ({"tensor": "w", "take": {0: 1}}, (D,), [EACH[0]], EACH[0][1]),
    "some rows": ({"tensor": "w", "take": {0: ["f - 2", "f"]}}, (2, D), [EACH[0]], EACH[0][2:]),
    "gates of stacked experts": (
        {"tensor": "w", "shape": ["experts", 2, "f", "d"], "take": {1: 0}},
        (E * F, D),
        [GATE_UP],
        np.concatenate([GATE_UP[e, :F] for e in range(E)]),
    ),
    "every second column": (
        {"tensor": "w", "shape": ["experts", "d", "f", 2], "take": {3: 1}, "transpose": [0, 2, 1]},
        (E * F, D),
        [PAIRED],
        np.concatenate([PAIRED[e, :, 1::2].T for e in range(E)]),
    ),
    "columns by expert": (
        {"tensor": "w", "shape": ["experts", "d", "f"], "transpose": [1, 0, 2]},
        (D, E * F),
        [DOWN],
        np.concatenate([DOWN[e] for e in range(E)], axis=1),
    ),
    "one tensor an expert": ({"stack": "w.#", "count": "experts"}, (E * F, D), EACH, np.concatenate(EACH)),
    "their columns": (
        {"stack": "w.#", "count": "experts", "axis": 1, "transpose": True},
        (D, E * F),
        EACH,
        np.concatenate([w.T for w in EACH], axis=1),
    ),
}


def stored_of(what: str) -> tuple[Part, list[np.ndarray], np.ndarray]:
    rule, slot, stored, wanted = RULES[what]
    return part_of(rule, slot, "7", "", NAMES), stored, wanted


@pytest.mark.parametrize("what", RULES)
def test_a_rule_reads_and_writes_the_same_values(what: str) -> None:
    part, stored, wanted = stored_of(what)
    assert part.fault({name: t.shape for name, t in zip(part.tensors, stored, strict=True)}) is None
    assert np.array_equal(part.read(stored), wanted)
    copies = [np.array(t) for t in stored]
    part.write(copies, wanted + 1)
    assert np.array_equal(part.read(copies), wanted + 1)
    changed = sum(int((a != b).sum()) for a, b in zip(copies, stored, strict=True))
    assert changed == wanted.size  # and nothing else


@pytest.mark.parametrize("what", RULES)
def test_stored_tensors_that_do_not_fit_are_named(what: str) -> None:
    part, stored, _ = stored_of(what)
    shapes = {name: t.shape for name, t in zip(part.tensors, stored, strict=True)}
    last = part.tensors[-1]
    assert part.fault({k: v for k, v in shapes.items() if k != last}) == f"{last} is missing"
    longer = (*shapes[last][:-1], shapes[last][-1] + 1)
    assert (part.fault({**shapes, last: longer}) or "").startswith(f"{last} has shape {list(longer)}, expected")


def test_neighbours_may_be_joined_but_not_exchanged() -> None:
    part = part_of({"tensor": "w", "shape": ["experts", 2, "f", "d"], "take": {1: 0}}, (E * F, D), "", "", NAMES)
    assert part.fault({"w": (E * 2 * F, D)}) is None
    assert "with neighbours joined" in (part.fault({"w": (D, E * 2 * F)}) or "")


def test_the_layer_and_the_prefix_are_put_in() -> None:
    assert part_of("h.*.w", (1,), "12", "model.", {}).tensors == ("model.h.12.w",)
    stack = part_of({"stack": "h.*.#.w", "count": 2}, (2, 1), "12", "", {})
    assert stack.tensors == ("h.12.0.w", "h.12.1.w")


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("4 * d", 20),
        ("(d + 1) / 4", 1.5),
        ("-d // 2", -3),
        ("int(d * 0.5)", 2),
        ("ceil(d / 2)", 3),
        ("max(d, f) - min(d, f)", 1),
        ("sqrt(f)", 2.0),
        (7, 7),
        ("True", True),
    ],
)
def test_formulas_give_numbers(formula: Any, value: Any) -> None:
    assert evaluated(formula, NAMES) == value


@pytest.mark.parametrize(
    ("formula", "said"),
    [
        ("d // zero", "d // zero cannot be worked out for d = 5, zero = 0"),
        ("d * nothing", "may not hold nothing"),
        ("__import__('os')", "may not hold"),
        ("d.real", "may not hold"),
        ("d +", "cannot be worked out"),
        ("sqrt(-d)", "cannot be worked out"),
        ("d ** d", "may not hold"),
        ("d + word", "cannot be worked out"),
    ],
)
def test_formulas_that_give_none_say_why(formula: str, said: str) -> None:
    with pytest.raises(BadInput, match=said.replace("*", r"\*")):
        evaluated(formula, {**NAMES, "zero": 0, "word": "x"})


def test_an_unknown_key_of_a_rule_is_refused() -> None:
    with pytest.raises(BadInput, match=r"unknown key 'transposed'.*allowed are tensor, stack"):
        part_of({"tensor": "w", "transposed": True}, (1,), "", "", {})
