"""Where the boxes of a drawing stand: layers from the stream upwards, the residual stream straight up on the left.

Every edge runs between neighbouring layers: longer ones get a narrow lane of their own in each layer that they pass, so
that no edge runs through a box. Heights and widths are given; y grows upwards here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

from ..errors import BadInput

GAP = 30.0  # between boxes of one layer
LIFT = 40.0  # between layers
LANE = 12.0  # the width of an edge that passes a layer
SWEEPS = 8
MOST_LANES = 20_000


@dataclass(frozen=True)
class Layout:
    """Centres of the boxes, and for each edge the points through which it passes between two boxes.

    Attributes:
        centres: (x, y) of each box.
        bands: lower and upper y of each box's layer.
        lanes: for each edge, for every layer that it passes, the x of its lane and the layer's lower and upper y.
        width, height: of the whole; x and y begin at 0.
    """

    centres: tuple[tuple[float, float], ...]
    bands: tuple[tuple[float, float], ...]
    lanes: Mapping[tuple[int, int], tuple[tuple[float, float, float], ...]]
    width: float
    height: float


@dataclass
class _Slot:
    """A box, or the lane of an edge, in its layer."""

    layer: int
    width: float
    trunk: bool
    x: float = 0.0
    below: list[_Slot] = field(default_factory=list, repr=False)
    above: list[_Slot] = field(default_factory=list, repr=False)


def place(sizes: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int]], first: int, last: int) -> Layout:
    """A layout of boxes of the given (width, height), which the edges (lower, upper) order.

    Args:
        first, last: the boxes of the stream and of the output, between which the trunk runs.

    Raises:
        BadInput: too many edges that pass too many layers.
    """
    layers = _layers(len(sizes), edges, first)
    if sum(layers[b] - layers[a] - 1 for a, b in edges) > MOST_LANES:
        raise BadInput("the block is too entangled for a drawing")
    trunk = _shortest(edges, first, last)
    slots, lanes = _slots(sizes, edges, layers, trunk)
    rows: dict[int, list[_Slot]] = {}
    for slot in [*slots, *(s for lane in lanes.values() for s in lane)]:
        rows.setdefault(slot.layer, []).append(slot)
    _arrange(rows)
    return _measured(sizes, slots, lanes, rows)


def _layers(count: int, edges: Iterable[tuple[int, int]], first: int) -> list[int]:
    """The length of the longest way to each box; what nothing leads to stands next to what reads it."""
    above: dict[int, list[int]] = {}
    waiting = [0] * count
    for a, b in edges:
        above.setdefault(a, []).append(b)
        waiting[b] += 1
    sources = [i for i in range(count) if not waiting[i]]
    layers, ready = [0] * count, deque(sources)
    while ready:
        a = ready.popleft()
        for b in above.get(a, ()):
            layers[b] = max(layers[b], layers[a] + 1)
            waiting[b] -= 1
            if not waiting[b]:
                ready.append(b)
    for a in sources:
        if a != first and a in above:
            layers[a] = max(0, min(layers[b] for b in above[a]) - 1)
    return layers


def _shortest(edges: Iterable[tuple[int, int]], first: int, last: int) -> frozenset[tuple[int, int]]:
    """The edges of a shortest way from the stream to the output: the residual stream, where there is one."""
    below: dict[int, list[int]] = {}
    for a, b in edges:
        below.setdefault(b, []).append(a)
    upper: dict[int, int] = {last: last}
    ready = deque([last])
    while ready and first not in upper:
        b = ready.popleft()
        for a in below.get(b, ()):
            if a not in upper:
                upper[a] = b
                ready.append(a)
    way, at = [], first
    while at in upper and at != last:
        way.append((at, upper[at]))
        at = upper[at]
    return frozenset(way)


def _slots(
    sizes: Sequence[tuple[float, float]], edges: Sequence[tuple[int, int]], layers: list[int],
    trunk: frozenset[tuple[int, int]],
) -> tuple[list[_Slot], dict[tuple[int, int], list[_Slot]]]:  # fmt: skip
    on_trunk = {end for edge in trunk for end in edge}
    slots = [_Slot(layers[i], width, i in on_trunk) for i, (width, _) in enumerate(sizes)]
    lanes: dict[tuple[int, int], list[_Slot]] = {}
    for a, b in edges:
        lane = [_Slot(k, LANE, (a, b) in trunk) for k in range(layers[a] + 1, layers[b])]
        chain = [slots[a], *lane, slots[b]]
        for lower, upper in pairwise(chain):
            lower.above.append(upper)
            upper.below.append(lower)
        lanes[a, b] = lane
    return slots, lanes


def _arrange(rows: Mapping[int, list[_Slot]]) -> None:
    """Orders each layer and moves its slots towards what they are joined to; the trunk stays on the left, at 0."""
    for row in rows.values():
        _spread(row)
    for sweep in range(SWEEPS):
        upwards = sweep % 2 == 0
        for layer in sorted(rows, reverse=not upwards):
            for slot in rows[layer]:
                joined = (slot.below if upwards else slot.above) or slot.below or slot.above
                if joined and not slot.trunk:
                    slot.x = fmean(s.x for s in joined)
            _spread(rows[layer])


def _spread(row: list[_Slot]) -> None:
    """Sorts a layer by x, the trunk first, and pushes its slots apart to the right until none overlap."""
    row.sort(key=lambda s: (not s.trunk, s.x))
    edge = None
    for slot in row:
        if edge is not None:
            slot.x = max(slot.x, edge + GAP + slot.width / 2)
        edge = slot.x + slot.width / 2


def _measured(
    sizes: Sequence[tuple[float, float]], slots: list[_Slot], lanes: Mapping[tuple[int, int], list[_Slot]],
    rows: Mapping[int, list[_Slot]],
) -> Layout:  # fmt: skip
    tall = dict.fromkeys(sorted(rows), 0.0)
    for slot, (_, height) in zip(slots, sizes, strict=True):
        tall[slot.layer] = max(tall[slot.layer], height)
    bottom, y = {}, 0.0
    for layer, height in tall.items():
        bottom[layer] = y
        y += height + LIFT
    everything = [s for row in rows.values() for s in row]
    left = min(s.x - s.width / 2 for s in everything)
    right = max(s.x + s.width / 2 for s in everything)
    centres = tuple((s.x - left, bottom[s.layer] + tall[s.layer] / 2) for s in slots)
    bands = tuple((bottom[s.layer], bottom[s.layer] + tall[s.layer]) for s in slots)
    passed = {
        edge: tuple((s.x - left, bottom[s.layer], bottom[s.layer] + tall[s.layer]) for s in lane)
        for edge, lane in lanes.items()
    }
    return Layout(centres, bands, passed, right - left, y - LIFT)
