"""The least cut of a network whose nodes let through only so much: Ford and Fulkerson, along shortest paths."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

SOURCE, SINK = ("", "source"), ("", "sink")
MOST_NODES = 64  # what lies further behind the ends is not looked at: a node there counts as a source

End = tuple[str, str]  # a node's way in, or its way out


def least_cut(ends: Iterable[str], reads: Callable[[str], Iterable[str]], room: Callable[[str], float]) -> list[str]:
    """The nodes of least `room` in all without which nothing flows from the sources to the `ends`.

    Of several, the one nearest to the sources. Sources are the nodes that read nothing.
    """
    left = _network(tuple(ends), reads, room)
    while True:
        came = _reached(left)
        if SINK not in came:
            return [n for n, side in came if side == "in" and (n, "out") not in came]
        path, at = [], SINK
        while at != SOURCE:
            path.append((came[at], at))
            at = came[at]
        flow = min(left[a][b] for a, b in path)
        for a, b in path:
            left[a][b] -= flow
            left[b][a] = left[b].get(a, 0.0) + flow


def _network(
    ends: tuple[str, ...], reads: Callable[[str], Iterable[str]], room: Callable[[str], float]
) -> dict[End, dict[End, float]]:
    """What may still flow from one end to another."""
    left: dict[End, dict[End, float]] = {SOURCE: {}, SINK: {}}
    queue = deque(dict.fromkeys(ends))
    seen = set(queue)
    while queue:
        name = queue.popleft()
        left.setdefault((name, "in"), {})[name, "out"] = room(name)
        left.setdefault((name, "out"), {})
        behind = tuple(reads(name)) if len(seen) < MOST_NODES else ()
        for other in behind:
            left.setdefault((other, "out"), {})[name, "in"] = float("inf")
            if other not in seen:
                seen.add(other)
                queue.append(other)
        if not behind:
            left[SOURCE][name, "in"] = float("inf")
    for name in ends:
        left[name, "out"][SINK] = float("inf")
    return left


def _reached(left: dict[End, dict[End, float]]) -> dict[End, End]:
    """What the source still reaches, each with where it was reached from, nearest first."""
    came, queue = {SOURCE: SOURCE}, deque([SOURCE])
    while queue:
        at = queue.popleft()
        for end, flow in left[at].items():
            if flow > 0 and end not in came:
                came[end] = at
                queue.append(end)
    return came
