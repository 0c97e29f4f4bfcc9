"""What a patch changes, parameter by parameter, worked out from its factors; nothing dense is formed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ..display import short, table
from ..errors import BadInput
from ..graph.changes import Change, MatrixChange, shape_of
from ..graph.graph import Globs, globs, listed

LAYER = re.compile(r"(?:^|[._/])(\d+)(?=[./]|$)")  # the first whole number in a slot's name


@dataclass(frozen=True)
class Row:
    """The change of one parameter.

    Attributes:
        slot: as the patch names it.
        layer: the first number in that name; None where it has none.
        parameter: the name with `*` in place of the layer's number.
        shape: of the parameter, in the orientation y = W z.
        rank: how many rank-1 terms a matrix's change holds (for one token, where it is per token); None for a vector.
        norm: Frobenius norm of the change; the largest of them, where it is per token.
        amplification: by how much the rounding of a matrix's factors is amplified in their product:
            sum_t |left_t| |right_t| over the product's norm. 1 where nothing cancels; None for a vector, for what is
            per token, and for a change that is zero.
        per_token: whether every token has a change of its own.
    """

    slot: str
    layer: int | None
    parameter: str
    shape: tuple[int, ...]
    rank: int | None
    norm: float
    amplification: float | None
    per_token: bool


@dataclass(frozen=True)
class Table:
    """The rows of a patch, in the order of its changes; prints, shows in a notebook, and iterates over `Row`s.

    Attributes:
        title: for which tokens the patch is exact.
    """

    title: str
    rows: tuple[Row, ...]

    __repr__ = short

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [HEAD, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
        return "\n".join([f"{len(self.rows)} changed parameter(s); {self.title}", *lines])

    def _repr_html_(self) -> str:
        return table(f"{len(self.rows)} changed parameter(s); {self.title}", HEAD, map(_cells, self.rows))

    def json(self) -> list[dict[str, Any]]:
        """The rows as JSON has them."""
        return [asdict(row) | {"shape": list(row.shape)} for row in self.rows]


HEAD = ("layer", "parameter", "shape", "rank", "norm", "amplification")


def table_of(changes: Mapping[str, Change], title: str) -> Table:
    """The table of a patch's changes."""
    return Table(title, tuple(_row(slot, change) for slot, change in changes.items()))


def selected(changes: Mapping[str, Change], layers: int | Iterable[int] | None, parameters: Globs) -> dict[str, Change]:
    """The changes in some layers (None: in all) whose slots match one of some globs (none: whatever they are).

    Raises:
        BadInput: a layer without a change, a glob that matches nothing, or nothing is left.
    """
    patterns, chosen = globs("parameters", parameters), _chosen(changes, layers)
    for pattern in patterns:
        if not any(fnmatchcase(slot, pattern) for slot in changes):
            raise BadInput(f"{pattern!r:.80} matches none of the changes; there are {listed(changes)}")
    kept = {
        slot: change
        for slot, change in changes.items()
        if (chosen is None or _layer(slot) in chosen) and (not patterns or any(fnmatchcase(slot, p) for p in patterns))
    }
    if not kept:
        raise BadInput("no change is in those layers and matches those globs; there would be nothing to apply")
    return kept


def _chosen(changes: Mapping[str, Change], layers: int | Iterable[int] | None) -> frozenset[int] | None:
    if layers is None:
        return None
    found = (layers,) if isinstance(layers, int) else tuple(layers) if isinstance(layers, Iterable) else (layers,)
    known = sorted({n for n in map(_layer, changes) if n is not None})
    if strange := [n for n in found if type(n) is not int or n not in known]:
        raise BadInput(f"layers holds {strange[0]!r:.40}; the patch changes {', '.join(map(str, known)) or 'no layer'}")
    return frozenset(found)


def _layer(slot: str) -> int | None:
    """The number of the layer that a slot's name tells; None where it holds no number."""
    found = LAYER.search(slot)
    return int(found[1]) if found else None


def _row(slot: str, change: Change) -> Row:
    found = LAYER.search(slot)
    layer = int(found[1]) if found else None
    name = slot if found is None else f"{slot[: found.start(1)]}*{slot[found.end(1) :]}"
    if not isinstance(change, MatrixChange):
        delta = np.asarray(change.delta, np.float64)
        norm = float(np.linalg.norm(delta, axis=-1).max(initial=0.0))
        shape = delta.shape[-1:] if change.per_token else shape_of(change)
        return Row(slot, layer, name, shape, None, norm, None, change.per_token)
    left, right = (np.asarray(factor, np.float64) for factor in (change.left, change.right))
    terms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    if change.per_token:
        return Row(slot, layer, name, shape_of(change), 1, float(terms.max(initial=0.0)), None, True)
    norm = _product_norm(left, right) if len(left) else 0.0
    amplification = float(terms.sum()) / norm if norm else None
    return Row(slot, layer, name, shape_of(change), len(left), norm, amplification, False)


def _product_norm(left: np.ndarray, right: np.ndarray) -> float:
    """|left^T right| by the factors' triangles, whose cancellation is that of the product and no worse."""
    upper = [np.asarray(np.linalg.qr(factor.T, mode="r")) for factor in (left, right)]
    return float(np.linalg.norm(upper[0] @ upper[1].T))


def _cells(row: Row) -> tuple[str, ...]:
    each = " a token" if row.per_token else ""
    return (
        "-" if row.layer is None else str(row.layer),
        row.parameter,
        " x ".join(map(str, row.shape)),
        "-" if row.rank is None else f"{row.rank}{each}",
        f"{row.norm:.3g}",
        "-" if row.amplification is None else f"{row.amplification:.3g}",
    )
