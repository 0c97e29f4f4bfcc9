"""An ordinary run of a model: what it is called with, what it gives, and in which dtype it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockkit.absorbing.lockstep import EPS
from blockkit.errors import BadInput, BlockkitError, blamed

from ..calling.interface import Interface, logits_of
from ..calling.prompts import Prompt
from ..watching.watcher import Finished


def call(model: nn.Module, interface: Interface, prompt: Prompt, keep: int, more: Mapping[str, Any]) -> Tensor:
    """An ordinary run: the logits of the last `keep` tokens, `[batch, keep, vocabulary]`.

    Raises:
        BadInput: the model's own forward fails on it.
    """
    args, kwargs = interface.inputs(prompt.value, **prompt.options(logits_to_keep=keep))
    try:
        result = model(*args, **{**kwargs, **more})
    except (BlockkitError, Finished, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        given = "embeddings" if prompt.value.is_floating_point() else "ids"
        raise BadInput(
            f"the forward of {type(model).__name__} fails on {given} of shape {tuple(prompt.value.shape)} "
            f"({str(prompt.value.dtype).removeprefix('torch.')}): {blamed(error)}"
        ) from error
    return logits_of(result)[:, -keep:]


def model_dtype(model: nn.Module) -> str:
    """The dtype in which the model computes: that of most of its numbers."""
    counts: Counter[torch.dtype] = Counter({torch.float32: 0})
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    name = str(counts.most_common(1)[0][0]).removeprefix("torch.")
    if name not in EPS:
        raise BadInput(f"the model's parameters are {name}; allowed are {', '.join(EPS)}")
    return name
