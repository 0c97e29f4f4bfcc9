"""Whether a PyTorch model is what it was, to the last bit."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def hashes(model: nn.Module) -> dict[str, tuple[int, str]]:
    """Which object every parameter is, and its bytes."""
    return {
        name: (id(p), hashlib.sha256(p.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest())
        for name, p in model.named_parameters(remove_duplicate=False)
    }
