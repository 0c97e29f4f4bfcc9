"""Parts of a program that no primitive describes: what they read, and whether they look across tokens."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..calling.token_rows import close, rows_of
from .draft import Draft
from .values import Constant, Known, Raw


def region(draft: Draft, node: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """The program's nodes between known rows and this one, in order, and the rows that they read."""
    inside: set[fx.Node] = {node}
    ends: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        for read in stack.pop().all_input_nodes:
            form = draft.form(read)
            if isinstance(form, Known):
                draft.signal(read)
                ends[read] = None
            elif isinstance(form, Raw) and read not in inside and read not in draft.exported.memory:
                inside.add(read)
                stack.append(read)
    return tuple(n for n in draft.exported.nodes if n in inside), tuple(ends)


def mixes(draft: Draft, node: fx.Node, axis: int, inside: tuple[fx.Node, ...], ends: tuple[fx.Node, ...]) -> bool:
    """Whether a token's result depends on anything but that token's own vector.

    On other tokens, on another sequence, or on the token's place as the block itself counts it (which is another one
    when the context is gone; positions that come as arguments stay).
    """
    read = [a for n in inside for a in n.all_input_nodes]
    if any(a in draft.exported.memory for a in read) or any(_counts_places(draft, a) for a in read):
        return True
    return _looks_across(draft, node, axis, inside, ends)


def _counts_places(draft: Draft, node: fx.Node) -> bool:
    """Whether a known value has an entry of its own for every token, made within the block."""
    form, value = draft.form(node), draft.exported.values.get(node)
    if not isinstance(form, Constant) or form.given or not isinstance(value, Tensor):
        return False
    axes = [i for i, size in enumerate(value.shape) if size == draft.tokens]
    return len(axes) == 1 and not torch.equal(value, value.narrow(axes[0], 0, 1).expand_as(value))


def _looks_across(
    draft: Draft, node: fx.Node, axis: int, inside: tuple[fx.Node, ...], ends: tuple[fx.Node, ...]
) -> bool:
    """Whether a row changes when other rows of what is read do."""
    plain = rows_of(draft.exported.values[node], axis).double()
    for row in (0, draft.tokens // 2):
        moved = {end: _perturbed(draft, end, row) for end in ends}
        try:
            again = draft.exported.replay(inside, moved)[node]
        except Exception:
            return True  # it cannot even be run with other values: nothing is known of it
        rest = [i for i in range(draft.tokens) if i != row]
        other = rows_of(again, axis).double()
        if other.shape != plain.shape or not close(other[rest], plain[rest], 1e-5):
            return True
    return False


def _perturbed(draft: Draft, end: fx.Node, row: int) -> Tensor:
    form, value = draft.forms[end], draft.exported.values[end]
    axis = form.axis if isinstance(form, Known) else 0
    moved: Tensor = value.clone()
    part = moved.select(axis, row)
    if value.is_floating_point():
        generator = torch.Generator().manual_seed(row + 1)
        part.add_(torch.randn(part.shape, generator=generator) * (value.abs().mean() + 1e-3))
    else:
        part.copy_(value.select(axis, (row + 1) % draft.tokens))
    return moved


def between(draft: Draft, source: fx.Node, node: fx.Node) -> tuple[fx.Node, ...]:
    """The program's nodes that depend on the source and lead to the node, in order."""
    after = {source}
    for n in draft.exported.nodes:
        if any(a in after for a in n.all_input_nodes):
            after.add(n)
    before, stack = {node}, [node]
    while stack:
        for a in stack.pop().all_input_nodes:
            if a in after and a not in before and a is not source:
                before.add(a)
                stack.append(a)
    return tuple(n for n in draft.exported.nodes if n in before)
