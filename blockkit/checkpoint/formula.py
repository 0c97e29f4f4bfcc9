"""Arithmetic in the catalogue's rules: `heads * head_dim`, `int(d_model / 2)`, never run as code."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import BadInput

OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "sqrt": math.sqrt, "int": int, "ceil": math.ceil, "min": min, "max": max,
}  # fmt: skip


def evaluated(formula: Any, names: Mapping[str, Any]) -> Any:
    """The value of a formula over names: numbers, + - * / //, sqrt, int, ceil, min and max.

    Raises:
        BadInput: a name without a value, an operation that is not known, or one that fails on these values.
    """
    if not isinstance(formula, str):
        return formula
    try:
        return _value(ast.parse(formula.strip(), mode="eval").body, names)
    except (ArithmeticError, TypeError, ValueError, SyntaxError) as error:
        shown = ", ".join(f"{name} = {value!r}" for name, value in names.items() if name in formula)
        raise BadInput(f"{formula} cannot be worked out for {shown or 'these settings'}: {error}") from None


def _value(node: ast.AST, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_number(left, names), _number(right, names))
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_number(inner, names)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_value(a, names) for a in args))
    raise BadInput(f"a catalogue formula may not hold {ast.unparse(node)}")


def _number(node: ast.AST, names: Mapping[str, Any]) -> int | float:
    value = _value(node, names)
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r:.60} is not a number")
    return value
