"""A model that you already have: judged, patched in place, and restored to the last bit.

needs: pip install -e ".[inplace]"
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import blockkit as bk
from blockkit.backends.pytorch import absorb


class Block(nn.Module):
    """A block of one's own: two mixers side by side, a shared norm, and a learnt scale for each branch."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.convolution = nn.Conv1d(width, width, 3, groups=width)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)
        self.rate = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, width]`, every token seeing itself and those before it."""
        z = self.norm(x)
        tokens = x.shape[1]
        later = torch.triu(torch.ones(tokens, tokens, dtype=torch.bool), 1)
        attended, _ = self.attention(z, z, z, attn_mask=later, need_weights=False)
        convolved = self.convolution(nn.functional.pad(z.transpose(1, 2), (2, 0))).transpose(1, 2)
        x = x + self.rate * (attended + convolved)
        return x + self.down(torch.relu(self.up(self.norm(x))))


torch.manual_seed(0)
block = Block().eval()
print(bk.check(block))

context, query = torch.randn(1, 20, 32), torch.randn(1, 3, 32)
patch = absorb(block, context, query, tokens="all")  # one static patch for all three tokens
with torch.no_grad():
    wanted = block(torch.cat([context, query], 1))[:, -3:]
    without = block(query)
    with patch.applied(block) as receipt:
        own = block(query)
print(receipt)
print(f"largest difference: {(own - wanted).abs().max():.1e}, without the patch {(without - wanted).abs().max():.1e}")
