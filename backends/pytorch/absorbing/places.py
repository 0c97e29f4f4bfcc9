"""Where the tokens of a prompt stand in the model's own eyes, and whether padded rows stand where they would alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from blockkit.absorbing.lockstep import EPS
from blockkit.errors import BadInput

from ..blocks.traced import Traced
from ..calling.interface import Interface
from ..calling.prompts import Prompt
from ..calling.token_rows import close
from ..watching.positions import own_positions
from .run import call, model_dtype


def placed(model: nn.Module, interface: Interface, traced: Traced, prompt: Prompt, more: Mapping[str, Any]) -> Prompt:
    """The prompt with the positions that an ordinary call of the model gives it.

    Without padding the model is told none, as a user tells it none. With padding it is told those that its mask
    counts, as `generate` tells it; unless it counts several for a token, which only itself can.

    Args:
        more: further arguments of the call.
    """
    if "position_ids" not in interface.takes:
        return prompt
    ordinary = replace(prompt, counted=True)
    own = own_positions(
        model, traced, lambda: call(model, interface, ordinary, 1, more), prompt.batch, prompt.length
    )  # fmt: skip
    if own is None:
        return ordinary if prompt.mask is None else prompt
    if prompt.mask is not None and own.dim() == 2:
        return prompt
    return replace(ordinary, positions=own)


def require_held(
    model: nn.Module, interface: Interface, traced: Traced, reduced: Prompt, more: Mapping[str, Any]
) -> None:
    """Refuses a model that gives the tokens other positions than it is told.

    Raises:
        BadInput: with the first of both.
    """
    if "position_ids" not in interface.takes:
        return
    own = own_positions(model, traced, lambda: call(model, interface, reduced, 1, more), reduced.batch, reduced.length)
    if own is None:
        return
    kept = torch.ones_like(reduced.positions, dtype=torch.bool) if reduced.mask is None else reduced.mask.bool()
    wrong = ((own != reduced.positions) & kept).nonzero()
    if len(wrong):
        place = tuple(wrong[0].tolist())
        told = reduced.positions.expand_as(own)[place]
        raise BadInput(
            f"{type(model).__name__} is told that a token stands at {int(told)} and puts it at {int(own[place])}: "
            "without its context the query cannot be given its positions"
        )


def require_padding_unseen(model: nn.Module, interface: Interface, prompt: Prompt, more: Mapping[str, Any]) -> None:
    """Refuses padding that a model cannot be told positions for, and that moves the tokens behind it.

    The row with most padding is run alone, without it: its last token has to give the same logits.

    Raises:
        BadInput: it does not, or cannot be run alone.
    """
    if prompt.mask is None or "position_ids" in interface.takes:
        return
    with torch.no_grad():
        row = int((prompt.mask == 0).sum(1).argmax())
        real = prompt.mask[row] == 1
        alone = Prompt(prompt.value[row : row + 1, real], prompt.positions[row : row + 1, real])
        padded = call(model, interface, prompt, 1, more)[row : row + 1]
        single = call(model, interface, alone, 1, _row(more, row, prompt.batch))
    if not close(single.float(), padded.float(), max(1e-4, 32 * EPS[model_dtype(model)])):
        why = interface.loses or f"{type(model).__name__}.forward takes no position_ids"
        raise BadInput(
            f"row {row} is padded on the left, and gives other logits than without its padding: {why}, so its tokens "
            "stand elsewhere. Absorb prompts of one length, or one at a time"
        )


def _row(inputs: Mapping[str, Any], row: int, batch: int) -> dict[str, Any]:
    """The arguments of one sequence."""

    def own(value: Any) -> Any:
        return value[row : row + 1] if isinstance(value, Tensor) and value.dim() and len(value) == batch else value

    return {name: own(value) for name, value in inputs.items()}
