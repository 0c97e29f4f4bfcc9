"""What a model is to run on: prompts with their positions and padding, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockkit.errors import BadInput

from .interface import Interface, device_of, led_to, vocabulary
from .numbers import require_numbers


@dataclass(frozen=True)
class Prompt:
    """Token ids `[batch, n]` or embeddings `[batch, n, d_model]`, where they stand, and which of them are padding.

    Attributes:
        positions: `[batch, n]`; `[k, batch, n]` where the model gives each token several (image, row, column).
        mask: `[batch, n]`, 1 for tokens and 0 for padding; None where there is no padding.
        counted: whether the model counts these positions by itself, so that it is not told them.
    """

    value: Tensor
    positions: Tensor
    mask: Tensor | None = None
    counted: bool = False

    @property
    def batch(self) -> int:
        return int(self.value.shape[0])

    @property
    def length(self) -> int:
        return int(self.value.shape[1])

    def options(self, **more: Any) -> dict[str, Any]:
        """The keyword arguments that say all this."""
        told = None if self.counted else self.positions
        return {"position_ids": told, "attention_mask": self.mask, "use_cache": False, **more}

    def part(self, start: int, stop: int | None = None) -> Prompt:
        """Some of the tokens, in a row."""
        rows = slice(start, stop)
        return Prompt(self.value[:, rows], self.positions[..., rows], None if self.mask is None else self.mask[:, rows])

    def kept(self, places: Tensor) -> Prompt:
        """The tokens at some places."""
        mask = None if self.mask is None else self.mask[:, places]
        return Prompt(self.value[:, places], self.positions[..., places], mask)


def joined(
    model: nn.Module, context: Tensor, query: Tensor, masks: tuple[Tensor | None, Tensor | None], first: int = 0
) -> Prompt:
    """Context and query as one prompt; ids beside embeddings are embedded by the model.

    Args:
        first: the position of the first token.

    Raises:
        BadInput: shapes, devices, ids or masks that do not fit; the message says what is allowed.
    """
    for name, value in (("context", context), ("query", query)):
        require_fitting(model, name, value)
    if query.shape[0] != context.shape[0]:
        raise BadInput(f"the context has {context.shape[0]} sequences and the query {query.shape[0]}; give as many")
    if context.is_floating_point() != query.is_floating_point():
        context, query = embedded(model, context), embedded(model, query)
    if context.shape[2:] != query.shape[2:]:
        raise BadInput(f"context and query have widths {context.shape[-1]} and {query.shape[-1]}")
    value = torch.cat([context, query], dim=1)
    mask = _joined_mask(context, query, masks)
    if mask is None:
        positions = torch.arange(value.shape[1], device=value.device).expand(value.shape[:2])
    else:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return Prompt(value, positions + first, mask)


def embedded(model: nn.Module, value: Tensor) -> Tensor:
    """Ids as the model's own embeddings `[batch, n, d_model]`."""
    if value.is_floating_point():
        return value
    find = getattr(model, "get_input_embeddings", None) or getattr(led_to(model), "get_input_embeddings", None)
    if find is None:
        raise BadInput("ids cannot stand beside embeddings here: the model has no get_input_embeddings; embed them too")
    with torch.no_grad():
        return find()(value)


def require_fitting(model: nn.Module, name: str, value: Any) -> None:
    """Refuses what cannot be run: neither ids that the model knows nor embeddings, or on another device.

    Raises:
        BadInput: with what is allowed.
    """
    if not isinstance(value, Tensor):
        raise BadInput(f"the {name} must be a tensor of ids [batch, n] or embeddings [batch, n, d], not {type(value)}")
    wanted = 3 if value.is_floating_point() else 2
    if value.dim() != wanted:
        shape = "ids [batch, n]" if wanted == 2 else "embeddings [batch, n, d]"
        raise BadInput(f"the {name} has the shape {tuple(value.shape)}; {shape} are wanted")
    if not value.shape[0]:
        raise BadInput(f"the {name} has the shape {tuple(value.shape)}: there is no sequence in it")
    numbers = value.is_floating_point() or value.dtype in (torch.int64, torch.int32)
    if not numbers or value.layout is not torch.strided:
        raise BadInput(
            f"the {name} is {value.dtype}, {value.layout}; a dense tensor of ids (int64, int32) or of embeddings "
            "(floating-point) is wanted"
        )
    if not value.shape[1]:
        what = "there is nothing to absorb" if name == "context" else "it must hold at least one token"
        raise BadInput(f"the {name} is empty: {what}")
    if value.device != (device := device_of(model)):
        raise BadInput(f"the {name} is on {value.device}, the model on {device}; move it: .to({str(device)!r})")
    if value.is_floating_point():
        if not torch.isfinite(value).all():
            raise BadInput(f"the {name} holds numbers that are not finite")
        return
    count = vocabulary(model)
    low, high = int(value.min()), int(value.max())
    if count is not None and not 0 <= low <= high < count:
        raise BadInput(f"an id of the {name} is {low if low < 0 else high}; the model knows 0 to {count - 1}")


def _joined_mask(context: Tensor, query: Tensor, masks: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    if masks[0] is None and masks[1] is None:
        return None
    parts = []
    for name, value, mask in (("context", context, masks[0]), ("query", query, masks[1])):
        if mask is None:
            mask = torch.ones(value.shape[:2], dtype=torch.long, device=value.device)
        if not isinstance(mask, Tensor) or mask.device != value.device:
            where = mask.device if isinstance(mask, Tensor) else type(mask).__name__
            raise BadInput(f"the {name}'s mask must be a tensor of 0 and 1 on {value.device}, got {where}")
        if tuple(mask.shape) != tuple(value.shape[:2]):
            raise BadInput(f"the {name}'s mask has the shape {tuple(mask.shape)}, its ids {tuple(value.shape[:2])}")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise BadInput(f"the {name}'s mask holds other numbers than 0 (padding) and 1 (a token)")
        if not bool(mask[:, -1].all()):
            raise BadInput(f"the {name}'s mask ends in padding; pad on the left")
        parts.append(mask.long())
    whole = torch.cat(parts, dim=1)
    return None if bool(whole.all()) else whole


def require_ready(model: Any) -> Interface:
    """Refuses a model that gives different numbers at every run, or has none.

    Raises:
        BadInput: no module, in training mode, or without numbers (on the meta device).
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"the model is a {type(model).__name__}; a torch.nn.Module is wanted")
    interface = Interface.of(model)
    training = [n or type(m).__name__ for n, m in model.named_modules() if m.training]
    if training:
        raise BadInput(
            f"the model is in training mode ({training[0]}): dropout makes every run another one; call model.eval()"
        )
    require_numbers(model)
    return interface
