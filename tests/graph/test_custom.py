"""Components of a user's own: true laws are used, false ones refused with a counterexample; composites in YAML."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import pytest

import blockkit as bk
from blockkit.cli.main import main
from blockkit.design.documents import parse_document
from blockkit.design.spec import architecture_from, to_document, write_yaml
from blockkit.planner.plan import STRATEGIES
from blockkit.trials.verify import EXACT


@dataclass(frozen=True)
class Stretch(bk.Operation):
    """y = gain * u * (1 + u^2): onto everything, one to one."""

    input: bk.Signal
    kind = "stretch"
    parameters = ("gain",)
    injective = True

    def compute(self, xp: Any, u: Any, gain: Any) -> Any:
        return gain * u * (1 + u * u)

    @bk.solves("u", "u' = the real root of u^3 + u = t / gain", nonzero=["gain"])
    def for_u(self, t: np.ndarray, u: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return 2 / np.sqrt(3) * np.sinh(np.arcsinh(1.5 * np.sqrt(3) * t / gain) / 3)

    @bk.solves("gain", "gain' = t / (u + u^3)", nonzero=["u"])
    def for_gain(self, t: np.ndarray, u: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return t / (u * (1 + u * u))


@dataclass(frozen=True)
class Square(bk.Operation):
    """y = u^2, and what is said of it."""

    input: bk.Signal
    kind = "square"
    low = 0.0

    def compute(self, xp: Any, u: Any) -> Any:
        return u * u

    @bk.solves("u", "u' = sqrt(t)")
    def for_u(self, t: np.ndarray, u: np.ndarray) -> np.ndarray:
        return np.sqrt(t)


@dataclass(frozen=True)
class Opaque(bk.Operation):
    """Something of which nothing is known but how it runs."""

    input: bk.Signal
    kind = "opaque"

    def compute(self, xp: Any, u: Any) -> Any:
        return xp.tanh(u) + 0.1 * xp.exp(-u * u)


@dataclass(frozen=True)
class Blend(bk.Operation):
    """Two signals: y = a + rate * b, steered by either."""

    inputs: tuple[bk.Signal, ...]
    rate: float = 0.5
    kind = "blend"

    def compute(self, xp: Any, a: Any, b: Any) -> Any:
        return a + self.rate * b

    @bk.solves("b", "b' = (t - a) / rate")
    def for_b(self, t: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (t - a) / self.rate


def behind(component: type[Any], **settings: Any) -> bk.Block:
    """A block whose only movable parameters stand behind, and in, the component."""
    x = bk.stream()
    v = x + bk.Mixer(x, name="mixed")
    return bk.Block(v + component(bk.Linear(v, name="up"), name="own", **settings), width=6)


# -- true laws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("only", [["up.weight"], ["own.gain"], ["*"]])
@pytest.mark.parametrize("tokens", [1, 2])
def test_declared_laws_are_used(only: list[str], tokens: int) -> None:
    verdict = bk.check(behind(Stretch), only=only)
    assert verdict.patchable is True
    assert {r.parameters for r in verdict.routes} >= ({("up.weight",)} if only == ["up.weight"] else {("own.gain",)})
    for strategy in STRATEGIES:
        found = bk.verify(behind(Stretch), strategy, only=only, tokens=tokens, seed=tokens)
        served = found.relative_linf is not None
        assert found.exact if served else "route" in found.reason
    matrix = bk.verify(behind(Stretch), "matrix", only=["up.weight"], tokens=tokens)
    assert matrix.exact and matrix.unpatched_relative is not None and matrix.unpatched_relative > 1e-2


def test_a_plan_shows_the_declared_formula_and_condition() -> None:
    (step,) = bk.plan(behind(Stretch), "minimal").steps
    assert (step.parameter, step.law) == ("own.gain", "stretch.gain")
    assert "gain' = t / (u + u^3)" in step.formula
    assert "up.weight.out is not zero where it has to change" in step.conditions[0]


def test_a_partial_reach_is_respected() -> None:
    verdict = bk.check(behind(Square), only=["up.weight"])
    assert verdict.patchable is not True
    assert any("never below 0" in o.reason for o in verdict.obstructions)
    assert not bk.verify(behind(Square), only=["up.weight"]).exact


def test_two_signals() -> None:
    x = bk.stream()
    v = x + bk.Mixer(x)
    block = bk.Block(Blend((v, bk.Linear(bk.RMSNorm(v), name="up")), rate=0.25), width=5)
    assert bk.verify(block, "matrix", only=["up.weight"]).exact


def test_nothing_to_divide_by_is_a_violation() -> None:
    x = bk.stream()
    v = x + bk.Mixer(x)
    block = bk.Block(v + Stretch(bk.Activation(bk.Linear(v), "relu", name="half"), name="own"), width=6)
    assert bk.check(block, only=["own.gain"]).patchable is None  # half of it is zero for whole regions
    found = bk.verify(block, "minimal", only=["own.gain"])
    assert not found.exact and "stretch" in found.reason


# -- no law at all -------------------------------------------------------------------------------


def test_an_opaque_operation_is_gone_around() -> None:
    x = bk.stream()
    v = x + bk.Attention(x, heads=2, head_dim=4, name="attention")
    block = bk.Block(v + Opaque(bk.Linear(v, name="up")), width=6)
    assert [r.parameters for r in bk.check(block).routes] == [("attention.o_proj",)]  # before it
    assert bk.verify(block).exact
    assert bk.check(block, freeze=["attention.*"]).patchable is None
    after = bk.check(bk.Block(Opaque(v) + bk.Bias(v, name="bias"), width=6), freeze=["attention.*"])
    assert after.patchable is True  # past it
    assert [r.parameters for r in after.routes] == [("bias.bias",)]


def test_an_opaque_operation_in_the_way_is_unknown() -> None:
    x = bk.stream()
    v = x + bk.Mixer(x)
    for block in (bk.Block(v + Opaque(bk.Linear(v, name="up")), 6), bk.Block(Opaque(v), 6)):
        for tokens in (None, 3):
            verdict = bk.check(block, tokens=tokens)
            assert verdict.patchable is None
    assert any("no law" in o.reason for o in bk.check(bk.Block(v + Opaque(bk.Linear(v)), 6)).obstructions)


# -- false declarations --------------------------------------------------------------------------


def lie(**changed: Any) -> Any:
    """`Square`, with something else said of it, or done."""
    return dataclass(frozen=True)(type("Lie", (Square,), {"kind": "lie", "__annotations__": {}, **changed}))


def per_token(self: Any, xp: Any, u: Any) -> Any:
    return u - np.mean(u, axis=0, keepdims=True)


def half_open(self: Any, xp: Any, u: Any) -> Any:
    return u * (u > 0)


FALSE: dict[str, tuple[type[bk.Operation], list[str]]] = {
    "a wrong inverse": (
        lie(for_u=bk.solves("u", "u' = t")(lambda self, t, u: t)),
        ["the law for u is false", "asked for [", "it gives u = [", "compute gives ["],
    ),
    "a law for positive targets only": (lie(low=None), ["the law for u is false", "asked for [", "-", "nan"]),
    "a range that is too small": (lie(high=1.0), ["high = 1 is declared", "u = [", "gives"]),
    "a range that is too large": (lie(low=-1.0), ["the law for u is false", "asked for [-", "nan"]),
    "a row that hangs on others": (lie(compute=per_token, low=None), ["same row", "among", "alone", "u = ["]),
    "a wrong shape": (
        lie(shape=lambda self, u: (u[0] + u[0],)),
        ["shape rule says [24, 12], compute gives [24, 6]"],
    ),
    "not injective": (lie(injective=True), ["injective is declared", "u = [", "give the same result"]),
    "zero for whole regions": (lie(compute=half_open), ["exactly zero", "vanishes = True", "u = ["]),
    "chance": (lie(compute=lambda self, xp, u: u * u + np.random.default_rng().random()), ["gave", "and then"]),
    "a law of a wrong shape": (
        lie(for_u=bk.solves("u", "?")(lambda self, t, u: t[:, :2])),
        ["the law for u gives an array [24, 2], not [24, 6]"],
    ),
    "a law that fails": (
        lie(for_u=bk.solves("u", "?")(lambda self, t, u: t / None)),
        ["law for u failed: TypeErr"],
    ),
    "a forward that fails": (lie(compute=lambda self, xp, u: u @ u), ["compute failed on arrays [24, 6]: ValueError"]),
    "a forward that writes": (lie(compute=lambda self, xp, u: u.__imul__(2)), ["compute failed", "read-only"]),
    "a law for nothing": (lie(more=bk.solves("w", "?")(lambda self, t, u: t)), ["no argument 'w'", "it has u"]),
    "two laws": (lie(more=bk.solves("u", "?")(lambda self, t, u: t)), ["two laws for 'u'"]),
    "no finite result": (lie(compute=lambda self, xp, u: np.sqrt(u), low=None), ["finite number", "nan"]),
}


@pytest.mark.parametrize("what", FALSE)
def test_false_declarations_are_refused(what: str) -> None:
    component, said = FALSE[what]
    with pytest.raises(bk.BadInput) as caught:
        bk.check(behind(component))
    assert str(caught.value).startswith("node 'own': lie: ") or "Lie" in str(caught.value)
    for part in said:
        assert part in str(caught.value)


def test_what_is_lied_about_is_true_otherwise() -> None:
    bk.check(behind(lie()))
    bk.check(behind(lie(compute=half_open, for_u=None, vanishes=True)))


def test_a_false_parameter_law_is_refused() -> None:
    @dataclass(frozen=True)
    class Wrong(Stretch):
        kind = "wrong"

        @bk.solves("gain", "gain' = t / u", nonzero=["u"])
        def for_gain(self, t: np.ndarray, u: np.ndarray, gain: np.ndarray) -> np.ndarray:
            return t / u

    with pytest.raises(bk.BadInput, match=r"the law for gain is false: asked for \[.*with u = \["):
        bk.check(behind(Wrong))


def test_symbolic_sizes_are_probed_too() -> None:
    x = bk.stream()
    v = x + bk.Mixer(x)
    with pytest.raises(bk.BadInput, match="the law for u is false"):
        bk.check(bk.Block(v + lie(low=None)(bk.Linear(v, out="d_ff"))))


# -- components by name, in files ----------------------------------------------------------------

SPEC = """
name: own
width: 6
components:
  tail:
    settings: {hidden: , rate: 0.5}
    inputs: [a, b]
    nodes:
      norm: {component: rms_norm, input: b}
      up: {component: linear, input: norm, out: $hidden}
      act: {component: stretch, input: up}
      down: {component: linear, input: act, out: 6}
      sum: {component: blend, inputs: [a, down], rate: $rate}
    output: sum
  pair:
    settings: {wide: 8}
    input: z
    nodes:
      first: {component: tail, inputs: [z, z], hidden: $wide}
      second: {component: tail, inputs: [z, first], hidden: 2*$wide, rate: 2.0}
    output: second
block:
  nodes:
    mixed: {component: mix, input: x}
    v: {component: add, inputs: [x, mixed]}
    y: {component: pair, input: v, wide: 5}
  output: y
"""
OWN = (Stretch, Blend)


def read(text: str = SPEC) -> Any:
    return architecture_from(*parse_document(text, "spec"), OWN)


def test_composites_unfold() -> None:
    graph = read().graphs["block"]
    assert graph.parameter["y.first.up.weight"].shape == (5, 6)
    assert graph.parameter["y.second.up.weight"].shape == (10, 6)
    assert graph.node["y.second.sum"].op.operation.rate == 2.0
    assert graph.node["y.first.sum"].op.operation.rate == 0.5
    assert bk.verify(read(), "matrix", only=["y.second.up.weight"]).exact


def test_composites_survive_writing_and_reading(tmp_path: Path) -> None:
    document = json.loads(json.dumps(to_document(read())))
    assert architecture_from(document, parse_document("{}", "spec")[1], OWN) == read()
    write_yaml(read(), tmp_path / "own.yaml")
    assert bk.load(tmp_path / "own.yaml", components=OWN) == read()
    jsonschema.validate(document, bk.schema())
    jsonschema.validate(document, bk.schema(OWN))


def replaced(old: str, new: str) -> str:
    assert old in SPEC
    return SPEC.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("component: stretch", "component: pair", ["circle: tail -> pair -> tail"]),
        ("component: stretch", "component: tail", ["circle: tail -> tail"]),
        ("wide: 5}", "wide: 5, deep: 3}", ["block.nodes.y.deep", "unknown key 'deep'", "wide"]),
        ("hidden: $wide}", "rate: 1.0}", ["no default for hidden", "(used at"]),
        ("out: $hidden", "out: $hiden", ["components.tail.nodes.up", "no setting $hiden", "$hidden, $rate"]),
        ("wide: 5}", "wide: a+b}", ["'2*$wide' cannot take 'a+b'"]),
        ("inputs: [z, z]", "input: z", ["'inputs' is missing", "reads a, b"]),
        ("inputs: [z, z]", "inputs: [z]", ["tail reads a, b"]),
        ("inputs: [z, z]", "inputs: [z, q]", ["'q'", "does not exist"]),
        ("output: sum", "output: summ", ["the output 'summ' must be one of its nodes"]),
        ("    inputs: [a, b]\n", "", ["either `input`", "components.tail"]),
        ("    output: sum\n", "", ["a composite needs `output`"]),
        ("  tail:\n", "  rms_norm:\n", ["there is a component 'rms_norm' already"]),
        ("  tail:\n", "  tail:\n    frozen: [a]\n", ["unknown key 'frozen'", "settings, input"]),
        ("out: 6", "out: 7", ["y.first.sum", "blend", "compute failed"]),
        ("rate: 2.0", "rate: fast", ["rate"]),
    ],
)  # fmt: skip
def test_mistakes_in_composites_name_their_place(old: str, new: str, said: list[str]) -> None:
    with pytest.raises(bk.BadInput) as caught:
        bk.check(read(replaced(old, new)))
    for part in said:
        assert part in str(caught.value), str(caught.value)


def test_a_bomb_of_composites_is_refused() -> None:
    levels = "".join(
        f"  c{i}: {{input: z, nodes: {{a: {{component: c{i + 1}, input: z}}, b: {{component: c{i + 1}, input: a}}}}, "
        f"output: b}}\n"
        for i in range(30)
    )
    last = "  c30: {input: z, nodes: {a: {component: bias, input: z}}, output: a}\n"
    text = f"width: 6\ncomponents:\n{levels}{last}block:\n  nodes: {{y: {{component: c0, input: x}}}}\n  output: y\n"
    with pytest.raises(bk.BadInput, match="more than 100000 components"):
        architecture_from(*parse_document(text, "bomb"))


@pytest.mark.parametrize(
    ("component", "said"),
    [
        (type("Plain", (bk.Component,), {"kind": "plain"}), "Plain must be a frozen dataclass"),
        (type("Nameless", (Stretch,), {"kind": ""}), "needs a name for specs"),
        (dataclass(frozen=True)(type("Norm", (Stretch,), {"kind": "rms_norm"})), "a component 'rms_norm' already"),
        (Stretch(""), "is not a component"),
        (int, "int is not a component"),
    ],
)  # fmt: skip
def test_what_is_no_component_is_refused(component: Any, said: str) -> None:
    with pytest.raises(bk.BadInput, match=said):
        architecture_from(*parse_document(SPEC, "spec"), [component])


# -- from the command line -----------------------------------------------------------------------

OWN_FILE = """
from dataclasses import dataclass
import blockkit as bk

@dataclass(frozen=True)
class Shift(bk.Operation):
    input: bk.Signal
    by: float = 1.0
    kind = "shift"

    def compute(self, xp, u):
        return u + self.by

    @bk.solves("u", "u' = t - by")
    def for_u(self, t, u):
        return t - self.by

@dataclass(frozen=True)
class Pair(bk.Component):
    input: bk.Signal
    hidden: int | str
    name: str = ""
    kind = "pair"

    def lower(self, to, name, inputs):
        up = to.linear(name, "up", inputs[0], to.shapes[inputs[0]], to.size(self.hidden), False)
        shifted = to.add(f"{name}.shifted", Shift("", by=2.0).op(), up)
        return to.linear(name, "down", shifted, to.size(self.hidden), to.shapes[inputs[0]], False)
"""
OWN_SPEC = """
width: d
block:
  nodes:
    mixed: {component: mix, input: x}
    v: {component: add, inputs: [x, mixed]}
    s: {component: shift, input: v, by: 3}
    p: {component: pair, input: s, hidden: f}
    y: {component: add, inputs: [v, p]}
  output: y
"""


class Ran:
    """The command line in a folder with a spec and a file of components."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        monkeypatch.chdir(folder)
        self.write(OWN_FILE)
        (folder / "spec.yaml").write_text(OWN_SPEC, encoding="utf-8")

    def write(self, text: str) -> None:
        (self.folder / "own.py").write_text(text, encoding="utf-8")

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["blockkit", *words, "--components", "own.py"])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *self.capsys.readouterr()


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ran:
    return Ran(tmp_path, monkeypatch, capsys)


def test_components_from_a_file(ran: Ran) -> None:
    status, out, _ = ran("check", "spec.yaml", "--json")
    assert status == 0
    assert [r["parameters"] for r in json.loads(out)["routes"]][:2] == [["p.down"], ["p.up"]]
    assert ran("plan", "spec.yaml", "--strategy", "matrix", "--json")[0] == 0
    status, out, _ = ran("verify", "spec.yaml", "--only", "p.up", "--json")
    assert status == 0 and json.loads(out)["relative_linf"] <= EXACT
    assert ran("compare", "spec.yaml", "spec.yaml")[0] == 0
    assert '"op": "shift"' in ran("graph", "spec.yaml")[1]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("import blockkit as bk", "import blockkit as", ["own.py, line 3: ", "yntax"]),
        ("import blockkit as bk", "import blockkitt as bk", ["own.py, line 3: ModuleNotFoundError"]),
        ("return t - self.by", "return t + self.by", ["shift: the law for u is false", "asked for ["]),
        ("return u + self.by", "return u + self.bye", ["AttributeError", "bye", "own.py, line 12"]),
        ("to.size(self.hidden), to.shapes", "self.hiden, to.shapes", ["'p' (pair) failed", "own.py, line 28"]),
        ("@dataclass(frozen=True)\nclass Pair", "class Pair", ["Pair must be a frozen dataclass"]),
        ("kind =", "sort =", ["own.py defines no component"]),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_one_message(ran: Ran, old: str, new: str, said: list[str]) -> None:
    assert old in OWN_FILE
    ran.write(OWN_FILE.replace(old, new))
    status, out, err = ran("check", "spec.yaml")
    assert status == 2 and out == "" and "Traceback" not in err
    for part in said:
        assert part in err, err


def test_a_file_of_components_must_be_one(ran: Ran) -> None:
    (ran.folder / "own.py").unlink()
    status, _, err = ran("check", "spec.yaml")
    assert status == 2 and "own.py is no Python file" in err
