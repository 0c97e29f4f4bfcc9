"""The table of the laws: asked of the operations themselves, argument by argument."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from blockkit.design.raw_graph import OPS
from blockkit.graph.laws import Law, joint_law, parameter_capacity
from blockkit.graph.ops import FUNCTIONS, Activation, Argument, Op
from blockkit.graph.ops.mixing import MixingOp
from blockkit.graph.ops.routing import Clamp
from blockkit.graph.sizes import Size

from .markdown import table

COLUMNS = ("operation", "solved for", "law", "formula", "results it reaches", "exact when", "tokens", "source")
SIGNAL = Argument((Size.of("d"),), False)
VECTOR = Argument((Size.of("d"),), True)
MATRIX = Argument((Size.of("d_out"), Size.of("d_in")), True)
Arguments = dict[str, Argument]

# What each operation is asked with: its settings, and its arguments by name.
SETTINGS: dict[str, dict[str, object]] = {
    "scale": {"alpha": 2.0},
    "softcap": {"cap": 30.0},
    "slice": {"start": Size.of(0), "stop": Size.of("d")},
    "top_k": {"k": Size.of(2)},
    "repeat": {"times": Size.of(2)},
    "opaque": {"width": Size.of("d")},
}
ARGUMENTS: dict[str, tuple[Arguments, ...]] = {
    "add": ({"u": SIGNAL, "v": SIGNAL}, {"u": SIGNAL, "b": VECTOR}),
    "multiply": ({"m": SIGNAL, "u": SIGNAL}, {"u": SIGNAL, "m": VECTOR}),
    "matmul": ({"z": Argument((Size.of("d_in"),), False), "W": MATRIX},),
}
SEVERAL: dict[str, Sequence[Op]] = {
    "activation": [Activation(fn) for fn in FUNCTIONS],
    "clamp": [Clamp(low=-1.0), Clamp(high=1.0), Clamp(-1.0, 1.0)],
}


def laws() -> str:
    """One row for every operation and argument, with what its law says."""
    return table(COLUMNS, [*_asked(), *_joint(), *_mixing()])


def _asked() -> Iterator[tuple[str, ...]]:
    for kind, cls in OPS.items():
        if not cls.mixing:
            for op in SEVERAL.get(kind) or [cls(**SETTINGS.get(kind, {}))]:
                yield from _rows(kind, op)


def _rows(kind: str, op: Op) -> Iterator[tuple[str, ...]]:
    """The rows of one operation; an argument that stands in several combinations has one."""
    seen = set()
    for arguments in ARGUMENTS.get(kind, ({"u": SIGNAL},)):
        names, values = list(arguments), list(arguments.values())
        for position, (name, argument) in enumerate(arguments.items()):
            law = op.law(position, values)
            shown = f"{name} ({'a parameter' if argument.parameter else 'a signal'})"
            if (shown if argument.parameter else "a signal", law and law.formula) in seen:
                continue
            seen.add((shown if argument.parameter else "a signal", law and law.formula))
            yield (_name(kind, op), shown, *_columns(law, names, argument))


def _name(kind: str, op: Op) -> str:
    if isinstance(op, Activation):
        return f"`{kind}`: {op.fn}"
    if isinstance(op, Clamp):
        return f"`{kind}`: {' and '.join(k for k in ('low', 'high') if getattr(op, k) is not None)}"
    return f"`{kind}`"


def _columns(law: Law | None, names: Sequence[str], argument: Argument) -> tuple[str, ...]:
    if law is None:
        return ("none", "-", "nothing", "planned around", "-", "-")
    reach = f"{law.reach.value}: {law.limit}" if law.limit else law.reach.value
    tokens = str(parameter_capacity(law.action, argument.shape)) if argument.parameter else "as what gives it"
    return (f"`{law.name}`", f"`{law.formula}`", reach, _condition(law, names), tokens, law.source)


def _condition(law: Law, names: Sequence[str]) -> str:
    ends = "where it has to change" if law.whole else "as a vector"
    parts = [f"{names[i]} is not zero {ends}" for i in law.nonzero] + ([f"{names[1]} {law.fact}"] if law.fact else [])
    if law.limit:
        parts.append("the target is among these results")
    return " and ".join(parts) or "always"


def _joint() -> Iterator[tuple[str, ...]]:
    for what in ("vector", "matrix"):
        law = joint_law(what == "matrix")
        yield (
            f"several linear ways from one {what}", f"p (a {what})", f"`{law.name}`", f"`{law.formula}`",
            law.reach.value, "one way that is left reaches everything by itself", "by its ways", law.source,
        )  # fmt: skip


def _mixing() -> Iterator[tuple[str, ...]]:
    """What looks at other tokens has no law: one row for all of it."""
    kinds = sorted({op.kind for op in _all(MixingOp) if op.kind} | {k for k, op in OPS.items() if op.mixing})
    shown = ", ".join(f"`{k}`" for k in kinds)
    yield (shown, "any argument", "none", "-", "nothing", "planned around", "-", "what looks at other tokens")


def _all(cls: type[Op]) -> Iterator[type[Op]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _all(sub)
