"""How a tensor came from a parameter, and whether a call multiplies by one: facts read off a call, never off shapes.

A model may read a matrix as it is stored, transposed, in another dtype, or as one slice of a stack (an expert).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Root:
    """The parameter itself, by its state-dict name."""

    name: str


@dataclass(frozen=True, eq=False)
class Step:
    """A call of parameters (or tensors derived from them) alone; `item` of its result, where that has several."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    item: int | None = None


Origin = Root | Step


@dataclass(frozen=True, eq=False)
class Product:
    """A call that multiplies every row of `z` by a parameter: `result = W z + whatever else the call adds`.

    Attributes:
        z: `[..., d_in]`.
        transposed: whether the parameter is stored `[d_in, d_out]`.
        index: which slice along the first axis of a stacked parameter `[n, ...]` the matrix is; None: all of it.
    """

    z: Tensor
    transposed: bool
    index: int | None = None


_MATMULS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_ADDMMS = {torch.addmm, Tensor.addmm}
_TRANSPOSES = {torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__, torch.adjoint, Tensor.adjoint}
_SWAPS = {torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes, torch.swapdims, Tensor.swapdims}
_PERMUTES = {torch.permute, Tensor.permute}
_UNBINDS = {torch.unbind, Tensor.unbind}
_SELECTS = {torch.select, Tensor.select}
_SAME = {
    Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type, Tensor.detach, torch.detach,
    Tensor.contiguous, Tensor.clone, torch.clone, Tensor.data.__get__, Tensor.cpu, Tensor.cuda,
}  # fmt: skip


def product(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str
) -> tuple[Any, bool, int | None] | None:
    """The other factor, the stored orientation and the slice, if the call is a product with parameter `name`.

    `NAME[e]` asks for the product with slice `e` of a stacked parameter; that slice then is the matrix.

    Args:
        args, kwargs: as the model gave them, with derived tensors in them.
    """
    found = _factors(func, args, kwargs)
    if found is None:
        return None
    z, matrix, stored_out_first = found
    way = _way_to_slot(matrix, name)
    if way is None or not isinstance(z, Tensor) or z.dim() == 0 or matrix.dim() != 2 or reads(z, name):
        return None
    flipped, index = way
    return z, flipped == stored_out_first, index


def reads(tensor: Any, name: str) -> bool:
    """Whether a tensor comes from the parameter `name`."""
    return name in getattr(tensor, "roots", ())


def _factors(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, Any, bool] | None:
    """The rows, the matrix, and whether the matrix stands there as `[d_out, d_in]`."""
    if func is functional.linear:
        named = dict(zip(("input", "weight"), args, strict=False)) | dict(kwargs)
        return named["input"], named["weight"], True
    if func in _MATMULS:
        values = [*args, *kwargs.values()]
        return (values[0], values[1], False) if len(values) == 2 else None
    if func in _ADDMMS:
        values = [*args, *(kwargs[k] for k in ("mat1", "mat2") if k in kwargs)]
        return (values[1], values[2], False) if len(values) == 3 and kwargs.get("alpha", 1) == 1 else None
    if func is torch.einsum:
        return _einsum_factors(args)
    return None


def _einsum_factors(args: tuple[Any, ...]) -> tuple[Any, Any, bool] | None:
    """Of `...i,oi->...o`, whatever the letters: one contracted axis, last in both the rows and the result."""
    if len(args) == 2 and isinstance(args[1], (list, tuple)):
        args = (args[0], *args[1])
    if len(args) != 3 or not isinstance(args[0], str):
        return None
    reading, arrow, result = args[0].replace(" ", "").partition("->")
    terms = reading.split(",")
    if not arrow or len(terms) != 2:
        return None
    for rows, matrix, z, w in ((*terms, args[1], args[2]), (*reversed(terms), args[2], args[1])):
        letters = rows.replace("...", "")
        if len(matrix) != 2 or "." in matrix or not letters or len(set(letters)) != len(letters):
            continue
        inner = letters[-1]
        outer = matrix.replace(inner, "", 1)
        if inner in matrix and len(outer) == 1 and outer not in letters and result == rows[:-1] + outer:
            return z, w, matrix == outer + inner
    return None


def _way_to_slot(tensor: Any, slot: str) -> tuple[bool, int | None] | None:
    """`_way`, also to one slice of a stack (`NAME[e]`), which then is the matrix."""
    way = _way(tensor, slot)
    if way is not None or not slot.endswith("]"):
        return way
    name, _, index = slot[:-1].rpartition("[")
    way = _way(tensor, name)
    return (way[0], None) if way is not None and str(way[1]) == index else None


def _way(tensor: Any, name: str) -> tuple[bool, int | None] | None:
    """Whether the matrix is the parameter transposed, and which slice of it; None if it is something else of it."""
    origin = getattr(tensor, "origin", None)
    if isinstance(origin, Root):
        return (False, None) if origin.name == name else None
    if origin is None or not origin.args:
        return None
    source = origin.args[0]
    way = _way(source, name)
    if way is None:
        return None
    flipped, index = way
    if origin.func in _SAME:
        return way
    if _flips(origin, source.dim()):
        return not flipped, index
    chosen = _chosen(origin, source.dim())
    if chosen is not None and index is None:
        return flipped, chosen % source.shape[0]
    return None


def _flips(step: Step, dims: int) -> bool:
    """Whether a step exchanges the last two axes and does nothing else."""
    if step.func in _TRANSPOSES:
        return dims == 2 or step.func in (Tensor.mT.__get__, torch.adjoint, Tensor.adjoint)
    if step.func in _SWAPS:
        axes = [*step.args[1:], *step.kwargs.values()]
        return len(axes) == 2 and {a % dims for a in axes} == {dims - 1, dims - 2}
    if step.func in _PERMUTES:
        order = [*step.args[1:], *step.kwargs.values()]
        order = list(order[0]) if len(order) == 1 else order
        return [a % dims for a in order] == [*range(dims - 2), dims - 1, dims - 2]
    return False


def _chosen(step: Step, dims: int) -> int | None:
    """Which slice along the first of three axes a step takes."""
    if dims != 3:
        return None
    given = [*step.args[1:], *step.kwargs.values()]
    if step.func == Tensor.__getitem__ and type(given[0]) is int:
        return given[0]
    if step.func in _SELECTS and len(given) == 2 and given[0] == 0:
        return int(given[1])
    if step.func in _UNBINDS and (not given or given == [0]):
        return step.item
    return None
