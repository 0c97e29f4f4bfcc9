"""What has no law in a model in memory is refused under the name that people have for it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_models import ids, mixtral

import blockkit
from blockkit import NotPatchable
from blockkit.backends.pytorch import absorb


class Reader(nn.Module):
    """A residual block that looks back by a mean, and reads that by one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cumsum(x, 1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x + self.layer(x + seen)


class Along(nn.Module):
    """A convolution, over tokens or within them."""

    def __init__(self, size: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, size, groups=groups, padding=size - 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


REFUSED: dict[str, tuple[Any, str]] = {
    "depthwise": (lambda: Along(3, 16), r"conv\.weight is a weight of a depthwise convolution along the tokens"),
    "convolution": (lambda: Along(3, 1), r"conv\.weight is a weight of a convolution along the tokens"),
    "grouped": (lambda: Along(1, 4), r"grouped linear layer has no law for its argument layer\.conv\.weight"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_layer_without_a_law_is_named(kind: str) -> None:
    make, said = REFUSED[kind]
    torch.manual_seed(0)
    block = Reader(make()).eval().requires_grad_(False)
    found = blockkit.check(block)
    assert not found.patchable
    assert [o for o in found.obstructions if re.search(said, o.reason)], found.obstructions
    with pytest.raises(NotPatchable):
        absorb(block, torch.randn(1, 6, 16), torch.randn(1, 3, 16))


def test_stacked_experts_are_named() -> None:
    found = blockkit.check(mixtral(), only=["*experts*"])
    reasons = [o.reason for o in found.obstructions if "experts.down_proj" in o.reason]
    assert (
        not found.patchable and reasons and "layer of stacked experts, read as one operation, has no law" in reasons[0]
    )
    assert absorb(mixtral(), ids(1, 12), ids(1, 3, seed=2)).measured["linf"] < 1e-5  # around them


def test_a_weight_norm_serves_one_token_and_says_so() -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16, bias=False))
    block = Reader(layer).eval().requires_grad_(False)
    absorb(block, torch.randn(1, 6, 16), torch.randn(1, 3, 16))
    with pytest.raises(NotPatchable, match=r"for 3 tokens .* 1 can be served at most \(by layer\.parametrizations"):
        absorb(block, torch.randn(1, 6, 16), torch.randn(1, 3, 16), tokens="all")
