"""What components, blocks and architectures refuse when they are written with something that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import blockkit as bk
from blockkit.errors import BadInput

X = bk.stream()
BLOCK = bk.Block(X + bk.MLP(X, hidden=4), width=8)

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a class for a block": (lambda: bk.Block(bk.MLP, width=8), r"class MLP.*instance of it: MLP\(stream\(\), ...\)"),
    "a class, and settings after it": (lambda: bk.Block(bk.MLP, X), "the class MLP"),
    "a class for a signal": (lambda: bk.MLP(bk.RMSNorm, hidden=4), r"MLP reads the class RMSNorm.*RMSNorm\(stream"),
    "a class added": (lambda: X + bk.MLP, "Add reads the class MLP"),
    "a class multiplied": (lambda: X * bk.MLP, "Product reads the class MLP"),
    "a number for a signal": (lambda: bk.MLP(3, hidden=4), "MLP reads 3; expected another component or stream()"),
    "a number multiplied": (lambda: X * 3, "Product reads 3"),
    "a signal for signals": (lambda: bk.Concat(X), "Concat: inputs must be a list of signals"),
    "a component for a size": (lambda: bk.MLP(X, hidden=X), "MLP: hidden must be a whole number or a name"),
    "a fraction for a size": (lambda: bk.MLP(X, hidden=4.5), "MLP: hidden must be a whole number or a name, got 4.5"),
    "true for a size": (lambda: bk.MLP(X, hidden=True), "MLP: hidden must be a whole number"),
    "a name for a switch": (lambda: bk.MLP(X, hidden=4, bias="x"), "MLP: bias must be true or false"),
    "a number for a rotation": (lambda: bk.Attention(X, heads=2, rope=3), "rope must be an instance of RopeSettings"),
    "a class for a rotation": (lambda: bk.Attention(X, heads=2, rope=bk.RopeSettings), r"of it: RopeSettings\("),
    "a number for a name": (lambda: bk.stream(3), "Stream: name must be a name"),
    "a number for an output": (lambda: bk.Block(3, width=8), "a block's output is 3"),
    "a class among components": (lambda: bk.Block("a", nodes={"a": bk.MLP}), "Block: nodes must be a mapping"),
    "a list of components": (lambda: bk.Block("a", nodes=[X]), "Block: nodes must be a mapping"),
    "no width": (lambda: bk.Block(BLOCK.output, None, BLOCK.nodes), "Block: width must be a whole number"),
    "a number for a list of globs": (lambda: bk.Block(BLOCK.output, 8, BLOCK.nodes, tied=3), "tied must be a list of"),
    "a class for one of the blocks": (lambda: bk.Architecture("a", 8, {"b": bk.Block}), "Architecture: blocks must"),
    "blocks without names": (lambda: bk.Architecture("a", 8, [BLOCK]), "Architecture: blocks must be a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_where_it_is_written(name: str) -> None:
    write, why = WRONG[name]
    with pytest.raises(BadInput, match=why):
        write()


@pytest.mark.parametrize("kind", sorted(bk.design.components.COMPONENTS))
def test_no_component_takes_a_class_where_a_signal_goes(kind: str) -> None:
    from dataclasses import MISSING, fields

    cls: Any = bk.design.components.COMPONENTS[kind]
    given = {f.name: 4 for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    signals = {k: ((bk.MLP,) * 2 if k == "inputs" else bk.MLP) for k in ("input", "inputs") if k in given}
    with pytest.raises(BadInput, match=r"class MLP|must be"):
        cls(**{**given, **signals})
