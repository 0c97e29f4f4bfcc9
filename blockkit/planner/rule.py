"""The rule: which nodes of a block can be restored without the context, and which can be steered.

Compare two runs of a block on the same token: the *contextual* run sees the whole context, the *reduced* run does
not. Only mixing nodes can make the two differ. Two abilities of a node n are composed over the graph:

    restore(n)   make n's reduced value equal its contextual value;
    steer(n)     make n's reduced value equal any given target.

restore(n), by the first of these that holds:

    1. n does not depend on the context: there is nothing to do;
    2. steer(n), with the contextual value as the target;
    3. n is not a mixing node, and every argument of n can be restored.

steer(n), if some argument of n's operation has a law that reaches everything, and that argument is

    1. a parameter that may move, or
    2. a node with no other reader that can be steered itself.

That is all. An operation only declares its laws (`Op.law`); what a block can do follows. On a residual block the rule
is Theorem 5 of arXiv 2511.17864: an input controllable inside is restored, an output controllable outside is steered.
"No other reader" keeps steering lawful: the operation's other arguments cannot depend on what moves. A parameter may
move unless it is frozen, tied, or upstream of a mixing node, which no law inverts.

Two lemmas go past a single way down, as rules 3 and 4 of steer: a norm under an element-wise scale, whose direction a
matrix takes and whose remainder the scale takes (`blockkit.planner.routes`); and a parameter that reaches the goal in
several ways, all of them linear (`blockkit.planner.joint`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..graph.graph import Graph, Node
from ..graph.laws import Action, Kind
from ..graph.reach import Reach
from .analysis.facts import Facts
from .conditions import link_down
from .route import Link, Reasons


@dataclass(frozen=True)
class Way:
    """How a node is restored: by steering it along `link` first, or by nothing but its arguments.

    Attributes:
        open: whether it hangs on a condition that fails in whole regions.
    """

    link: Link | None = None
    open: bool = False


Restored = Mapping[str, Way | None]  # by node; None where no way restores it
Rung = Callable[[Node, Restored], Way | None]


class Rule:
    """The rule, applied to one graph. Every node is looked at once, so all is linear in the size of the graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.facts = Facts(graph)
        self.obstructions = Reasons()  # what the rule ran into

    # -- the rule --------------------------------------------------------------------------------

    def restore(self, *ladder: Rung, barred: frozenset[str] = frozenset()) -> Restored:
        """For every node, how it is made what it is in the contextual run.

        Arguments come before what reads them, so one pass decides all nodes. The rungs of the `ladder` are rules 2
        and 3, in the order in which they are tried; one that hangs on an open condition gives way to one that does
        not. `barred` nodes are not to be restored.
        """
        restored: dict[str, Way | None] = {}
        for node in self.graph.nodes:
            if node.name not in self.facts.contextual:
                restored[node.name] = Way()
            elif node.name in barred:
                restored[node.name] = None
            else:
                ways = (rung(node, restored) for rung in ladder)
                restored[node.name] = min((w for w in ways if w), key=lambda w: w.open, default=None)
        return restored

    def steer(self, goal: str, beyond: set[str] | None = None) -> Iterator[Link]:
        """Every single way down to a parameter that gives `goal` any value: the last law of each, under all others.

        They end at cuts, which are goals of their own, unless a set for the cuts `beyond` is given: a goal that
        asks for less than a cut behind it (a slice does) may be had where that cut may not.
        """
        pending: deque[tuple[str, Link | None]] = deque([(goal, None)])
        while pending:
            name, above = pending.popleft()
            if beyond is not None:
                beyond.add(name)
            for argument, link in self.laws(self.graph.node[name], above):
                if argument in self.facts.movable:
                    yield link
                elif self._passes(argument, name, beyond is not None):
                    pending.append((argument, link))

    # -- its rungs -------------------------------------------------------------------------------

    def by_steering(self, node: Node, restored: Restored) -> Way | None:
        """Rule 2: whatever its arguments are, some parameter gives the node any value."""
        return self._steered.get(node.name)

    def by_arguments(self, node: Node, restored: Restored) -> Way | None:
        """Rule 3: a token-wise node is right as soon as its arguments are."""
        behind = [restored.get(a, Way()) for a in self.facts.reads(node)]
        if node.op.mixing or None in behind:
            return None
        return Way(open=any(way.open for way in behind if way))

    def by_own_matrix(self, node: Node, restored: Restored) -> Way | None:
        """Rule 2 by the node's own movable matrix alone (Lemmas 6 and 7), unless that is a mixer's own projection."""
        if len(node.args) != 2 or node.args[1] not in self.facts.movable or len(self.graph.uses[node.args[1]]) > 1:
            return None
        fed = self.graph.node.get(node.args[0])
        link = self.law(node, 1)
        if link is None or link.law.action is not Action.WEIGHT or (fed is not None and fed.op.mixing):
            return None
        return Way(link, Kind.OPEN in link.kinds)

    # -- its lemmas ------------------------------------------------------------------------------

    def laws(self, node: Node, above: Link | None = None) -> Iterator[tuple[str, Link]]:
        """The arguments of a node by which it can be given any value, each with its law under those `above`."""
        for position, argument in enumerate(node.args):
            link = self.law(node, position, above)
            if link is not None:
                yield argument, link

    def law(self, node: Node, position: int, above: Link | None = None) -> Link | None:
        """The law of the argument at `position`, if it reaches everything and something behind it may move."""
        argument = node.args[position]
        if argument not in self.facts.movable and argument not in self.facts.steerable:
            return None
        law = node.op.law(position, self.graph.arguments(node))
        if law is None:
            if not node.op.mixing:
                self.obstructions.add(node.name, f"{node.op.kind} has no law for its argument {argument}")
            return None
        found = link_down(self.facts, node, position, law, above) if law.reach is Reach.ALL else law.limit
        if isinstance(found, str):
            self.obstructions.add(node.name, f"{node.name} ({node.op.kind}) stops what lies behind it: {found}")
            return None
        return found

    def _passes(self, argument: str, reader: str, beyond: bool) -> bool:
        """Whether the value may be steered: nothing else reads it, and it is no goal of its own."""
        if argument not in self.graph.node or (argument in self.facts.is_cut and not beyond):
            return False
        if len(self.graph.uses[argument]) == 1:
            return True
        readers = {n for n, _ in self.graph.uses[argument]} - {reader}
        others = ", ".join(sorted(readers)[:3]) or reader
        self.obstructions.add(
            argument, f"{argument} is also read by {others}, so steering it would move more than one term"
        )
        return False

    @cached_property
    def _steered(self) -> dict[str, Way]:
        """For every node that can be steered along a single way, the first law of such a way."""
        found: dict[str, Way] = {}
        for node in self.graph.nodes:
            ways = [
                Way(link, Kind.OPEN in link.kinds or (argument in found and found[argument].open))
                for argument, link in self.laws(node)
                if len(self.graph.uses[argument]) == 1 and (argument in self.facts.movable or argument in found)
            ]
            if ways:
                found[node.name] = min(ways, key=lambda w: w.open)
        return found

    def followed(self, link: Link) -> Link:
        """The way that begins with `link`, down to its parameter. What passes law by law passes all of them."""
        path = [link]
        while (argument := self.graph.node[path[-1].node].args[path[-1].position]) not in self.graph.parameter:
            below = self._steered[argument].link
            if below is None:
                raise RuntimeError(f"{argument} can be steered, and no law is noted for it")
            path.append(below)
        whole = self.extended(link, tuple(path[1:]))
        if whole is None:
            raise RuntimeError(f"a target of {link.node} passes each law on its way to {argument}, and not all of them")
        return whole

    def extended(self, above: Link, path: tuple[Link, ...]) -> Link | None:
        """The links of `path` again, under another one; None if less passes there."""
        for below in path:
            link = link_down(self.facts, self.graph.node[below.node], below.position, below.law, above)
            if isinstance(link, str):
                return None
            above = link
        return above
