"""Every public name is documented: what it is, shapes of arrays, what it raises, and where the reference has it."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

REFERENCE = Path(__file__).parents[2] / "examples" / "handbook" / "reference"
WRITTEN_OUT = {"Signal"}  # a type's other name: a heading of its own in place of a docstring
MODULES = {  # as imported, and as the reference's pages name it
    "blockkit": "blockkit",
    "blockkit.backends.pytorch": "backends.pytorch",
    "blockkit.backends.keras": "backends.keras",
}
NEEDS = {"blockkit.backends.pytorch": "transformers", "blockkit.backends.keras": "keras"}
ARRAYS = re.compile(r"\b(Array|ndarray|Tensor)\b")
SHAPE = re.compile(r"`[^`]*\[[^\]`]*\]`")


def public(module: str) -> list[tuple[str, Any]]:
    """The public names of a module with what they stand for."""
    if find_spec(NEEDS.get(module, "numpy")) is None:
        pytest.skip(f"{NEEDS[module]} is not installed")
    found = import_module(module)
    return [(name, getattr(found, name)) for name in found.__all__ if name not in WRITTEN_OUT]


def functions(name: str, thing: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """A function, or a class's public methods and properties, the inherited ones included, with their names."""
    if inspect.isfunction(thing):
        yield name, thing
    for key in dir(thing) if inspect.isclass(thing) else ():
        found = inspect.getattr_static(thing, key)
        if isinstance(found, property | cached_property):
            found = found.fget if isinstance(found, property) else found.func
        found = getattr(found, "__func__", found)
        if not key.startswith("_") and inspect.isfunction(found) and found.__module__.startswith("blockkit"):
            yield f"{name}.{key}", found


def every_function(module: str) -> Iterator[tuple[str, Callable[..., Any], str]]:
    """All public functions and methods with their docstrings, which a method may have from its base class."""
    for name, thing in public(module):
        for full, function in functions(name, thing):
            owner, _, key = full.rpartition(".")
            doc = inspect.getdoc(getattr(thing, key, None) if owner else function)
            yield full, function, inspect.getdoc(function) or doc or ""


@pytest.mark.parametrize("module", MODULES)
def test_every_name_has_a_docstring(module: str) -> None:
    things = [(name, inspect.getdoc(thing) or "") for name, thing in public(module)]
    without = [name for name, doc in (*things, *((n, d) for n, _, d in every_function(module))) if not doc]
    assert not without, f"no docstring: {without}"


@pytest.mark.parametrize("module", MODULES)
def test_what_raises_says_so(module: str) -> None:
    silent = [name for name, function, doc in every_function(module) if raises(function) and "Raises:" not in doc]
    for name, thing in public(module):
        checks = vars(thing).get("__post_init__") if inspect.isclass(thing) else None
        if checks is not None and raises(checks) and "Raises:" not in (inspect.getdoc(thing) or ""):
            silent.append(name)
    assert not silent, f"can raise, and their docstrings have no `Raises:`: {silent}"


@pytest.mark.parametrize("module", MODULES)
def test_arrays_have_shapes(module: str) -> None:
    without = []
    for name, function, doc in every_function(module):
        hints = " ".join(map(str, function.__annotations__.values()))
        if ARRAYS.search(hints) and not SHAPE.search(doc):
            without.append(name)
    assert not without, f"arrays without a shape in the docstring: {without}"


@pytest.mark.parametrize("module", MODULES)
def test_every_name_stands_in_the_reference_once(module: str) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
    entries = re.findall(rf"^::: {re.escape(MODULES[module])}\.([\w.]+)$", text, re.MULTILINE)
    assert sorted(entries) == sorted(name for name, _ in public(module))
    for name in WRITTEN_OUT:
        assert re.search(rf"^### {name}$", text, re.MULTILINE), f"{name} has no place in the reference"


# -- what can raise ----------------------------------------------------------------------------------


@cache
def raises(function: Callable[..., Any], depth: int = 1) -> bool:
    """Whether a function raises by itself, or hands on what a function it calls says that it raises."""
    tree = parsed(function)
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and not abstract(node):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and depth:
            called = function.__globals__.get(node.func.id)  # type: ignore[attr-defined]
            if inspect.isfunction(called) and called.__module__.startswith("blockkit"):
                said = "Raises:" in (inspect.getdoc(called) or "")
                if said or raises(called, depth - 1):
                    return True
    return False


def parsed(function: Callable[..., Any]) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # made by a decorator, as what a dataclass brings
        return ast.Module([], [])


def abstract(node: ast.Raise) -> bool:
    """Whether it only says that a subclass has to write this."""
    made = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return isinstance(made, ast.Name) and made.id == "NotImplementedError"


def test_a_function_that_raises_is_seen() -> None:
    def by_itself() -> None:
        raise ValueError

    def not_written() -> None:
        raise NotImplementedError

    assert raises(by_itself) and not raises(not_written)
    assert raises(import_module("blockkit.api").replace_constants) is False
