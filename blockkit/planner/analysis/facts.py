"""What the planner knows of a graph before it looks for routes. Every fact is worked out once, in linear time."""

from __future__ import annotations

from functools import cached_property

from ...graph.graph import Graph, Node
from ...graph.ops import Activation, LayerNorm, Multiply, RMSNorm, Scale, Softcap, Vanish
from ...graph.ops.routing import Clamp, Repeat
from ...graph.sizes import Size
from .combinations import Forms
from .spans import Spans, active_experts

BY_COORDINATE = Multiply | Activation | Softcap | Scale | Clamp  # a zero of an argument stays where it is


class Facts:
    """Facts about one graph: what may move, what vanishes, through which nodes the context must go."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def immovable(self, name: str) -> str | None:
        """Why the parameter may not move; None if it may."""
        parameter = self.graph.parameter[name]
        if parameter.tied:
            return f"{name} is tied: it is also used outside this block, so moving it changes more than this block"
        if parameter.frozen:
            return f"{name} is frozen; freeing it would help"
        if name in self.graph.before_mixing:
            own = {self.graph.node[reader].op for reader, _ in self.graph.uses[name]}
            if len(own) == 1 and (op := own.pop()).mixing and " " in op.kind:  # in words, by a front end
                return f"{name} is a weight of a {op.kind}, which no law inverts"
            return f"{name} lies upstream of a mixing node, which no law inverts"
        return None

    @cached_property
    def movable(self) -> frozenset[str]:
        return frozenset(p.name for p in self.graph.parameters if self.immovable(p.name) is None)

    @cached_property
    def steerable(self) -> frozenset[str]:
        """Nodes downstream of a movable parameter."""
        found: set[str] = set()
        for node in self.graph.nodes:
            if any(a in self.movable or a in found for a in node.args):
                found.add(node.name)
        return frozenset(found)

    @cached_property
    def vanishing(self) -> dict[str, Vanish]:
        """Nodes that are zero, in some or all coordinates, for whole regions of contexts."""
        found: dict[str, Vanish] = {}
        source: dict[str, str] = {}  # of values with holes: the node that made them
        for node in self.graph.nodes:
            levels = [found.get(a, Vanish.NEVER) for a in node.args]
            level = node.op.vanishing(levels)
            sources = {source.get(a, a) for a, zeros in zip(node.args, levels, strict=True) if zeros}
            alone = len(sources) == 1 and isinstance(node.op, BY_COORDINATE)
            if alone and isinstance(node.op, Multiply) and levels == [Vanish.HOLES, Vanish.HOLES]:
                level = Vanish.HOLES  # the same holes in both factors
            if level:
                found[node.name] = level
            if alone and level is Vanish.HOLES:
                source[node.name] = sources.pop()
        return found

    @cached_property
    def cuts(self) -> tuple[str, ...]:
        """The nodes any one of which restores the block, the output first.

        In topological order a node is a cut exactly if nothing before it is read after it, and no
        mixing node comes after it.
        """
        graph, cuts, furthest = self.graph, [], -1
        chain = [n for n in graph.nodes if n.name in graph.relevant and n.name in graph.contextual]
        last_mix = max((graph.index[n.name] for n in chain if n.op.mixing), default=-1)
        for node in chain:
            here = graph.index[node.name]
            if furthest <= here and last_mix <= here:
                cuts.append(node.name)
            furthest = max([furthest, *(graph.index[r] for r, _ in graph.uses.get(node.name, ()))])
        return tuple(reversed(cuts))

    @cached_property
    def is_cut(self) -> frozenset[str]:
        return frozenset(self.cuts)

    @cached_property
    def forms(self) -> Forms:
        return Forms(self.graph)

    @property
    def zero(self) -> frozenset[str]:
        return self.forms.zero

    def reads(self, node: Node) -> tuple[str, ...]:
        """What a node's value really depends on: its arguments, without the terms of a sum that cancel."""
        terms = self.forms.reads(node)
        own = any(t in self.movable or (t in self.steerable and t not in self.contextual) for t in terms)
        return node.args if own else terms  # a term of its own parameters would move with what is restored

    @cached_property
    def contextual(self) -> frozenset[str]:
        """The nodes that depend on the context, those left out in which it cancels or is multiplied by zero."""
        found: set[str] = set()
        for node in self.graph.nodes:
            if node.name not in self.zero and (node.op.mixing or any(a in found for a in self.forms.reads(node))):
                found.add(node.name)
        return frozenset(found)

    @cached_property
    def spans(self) -> Spans:
        return Spans(self.forms, active_experts(self.graph))

    @cached_property
    def experts(self) -> dict[str, Size]:
        """Values whose coordinates lie in equal blocks of which some are zero by choice: the width of a block."""
        found: dict[str, Size] = {}
        for node in self.graph.nodes:
            if isinstance(node.op, Repeat) and self.vanishing.get(node.name) is Vanish.HOLES:
                found[node.name] = node.op.times
            elif isinstance(node.op, BY_COORDINATE) and node.name in self.vanishing:
                blocks = [found[a] for a in node.args if a in found]
                if blocks:
                    found[node.name] = blocks[0]
        return found

    @cached_property
    def undefined(self) -> tuple[str, ...]:
        """Norms without an epsilon over what may be zero for whole regions: the block itself has no value there."""
        return tuple(
            node.name
            for node in self.graph.nodes
            if isinstance(node.op, RMSNorm | LayerNorm)
            and node.op.eps == 0
            and node.name in self.graph.relevant
            and (self.vanishing.get(node.args[0]) is Vanish.ALL or node.args[0] in self.zero)
        )
