"""Modules as people write them: blocks of unusual kinds and small language models, known to no library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

D, HEADS, HIDDEN, IDS = 16, 2, 24, 31


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in evaluation mode with numbers that hide nothing: no zeros, no ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise.to(parameter) if parameter.dim() < 2 else 0.1 * noise.to(parameter))
    return module.eval()


def causal(scores: Tensor) -> Tensor:
    n = scores.shape[-1]
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1), float("-inf"))


class Attention(nn.Module):
    """Causal attention over heads, with its projection."""

    def __init__(self, project: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.o = nn.Linear(D, D, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = causal(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).flatten(-2)
        return mixed if self.o is None else self.o(mixed)


class MLP(nn.Module):
    def __init__(self, bias: bool = True, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, hidden, bias=bias), nn.Linear(hidden, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class WrittenNorm(nn.Module):
    """RMS norm in small operations, with a weight."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Base(nn.Module):
    """An attention branch that the context reaches, for blocks that differ behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = Attention()


# -- residual streams ------------------------------------------------------------------------------


class ParallelSharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n, self.attn, self.mlp = nn.LayerNorm(D), Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x)
        return x + self.attn(h) + self.mlp(h)


class LayerScale(Base):
    """x + gamma * branch, with raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attn(self.n1(x))
        return x + self.mlp(self.n2(x)) * self.gamma2


class GatedResidual(Base):
    """x + sigmoid(W n) * f."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.gate = MLP(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        n = self.n2(x)
        return x + torch.sigmoid(self.gate(n)) * self.mlp(n)


class Highway(Base):
    """g * f + (1 - g) * x."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.gate = MLP(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        n = self.n2(x)
        g = self.gate(n).sigmoid()
        return g * self.mlp(n) + (1 - g) * x


class ReZero(Base):
    """One learned number for each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.alpha, self.beta = MLP(), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.alpha * self.attn(x)
        return x + self.beta * self.mlp(x)


class PostNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = self.n1(x + self.attn(x))
        return self.n2(x + self.mlp(x))


class Sandwich(Base):
    """Norms before and after each branch, the RMS norm written out."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.n3, self.n4 = MLP(bias=False), WrittenNorm(), WrittenNorm()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.n3(self.attn(self.n1(x)))
        return x + self.n4(self.mlp(self.n2(x)))


class InPlace(Base):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.attn(self.n1(x))
        x.add_(F.dropout(self.mlp(self.n2(x)), 0.1, self.training))
        return x


class Divided(Base):
    """A branch divided by one plus a positive signal, and clamped; softplus, and an L2 norm with a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.size, self.down = nn.Linear(D, HIDDEN), nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        n = F.normalize(x, dim=-1) * self.scale
        hidden = self.up(n).clamp(-2.0, 2.0) / (1 + F.softplus(self.size(n)))
        return x + self.down(hidden)


class NoProjection(Base):
    """Attention whose value reaches the residual stream as it is; an MLP makes up for it."""

    def __init__(self, mlp: bool = True) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(project=False), MLP() if mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        return x if self.mlp is None else x + self.mlp(self.n2(x))


# -- mixers ----------------------------------------------------------------------------------------


class TwoMixers(Base):
    """Attention beside a causal depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out, self.mlp = nn.Conv1d(D, D, 3, groups=D), nn.Linear(D, D), MLP()

    def forward(self, x: Tensor) -> Tensor:
        h = self.n1(x)
        local = self.conv(F.pad(h.transpose(1, 2), (2, 0))).transpose(1, 2)
        x = x + self.attn(h) + self.out(F.silu(local))
        return x + self.mlp(self.n2(x))


class Recurrent(Base):
    """Attention, then a GRU or an LSTM in a branch of its own; one norm serves two branches."""

    def __init__(self, kind: type[nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.rnn, self.out, self.mlp = kind(D, 12, batch_first=True), nn.Linear(12, D, bias=False), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        x = x + self.out(self.rnn(self.n2(x))[0])
        return x + self.mlp(self.n2(x))


class MovingAverage(Base):
    """A recurrence in a Python loop over tokens, and a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.out, self.mlp = nn.Parameter(torch.zeros(D)), nn.Linear(2 * D, D), MLP()

    def forward(self, x: Tensor) -> Tensor:
        h, keep = self.n1(x), self.decay.sigmoid()
        state, states = torch.zeros_like(h[:, 0]), []
        for t in range(h.shape[1]):
            state = keep * state + (1 - keep) * h[:, t]
            states.append(state)
        count = torch.arange(1, h.shape[1] + 1, device=h.device, dtype=h.dtype)[:, None]
        mean = h.cumsum(1) / count
        x = x + self.out(torch.cat([torch.stack(states, 1), mean], -1))
        return x + self.mlp(self.n2(x))


class LibraryAttention(Base):
    """`nn.MultiheadAttention` with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(D, HEADS, batch_first=True)  # type: ignore[assignment]
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        h = self.n1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.n2(x))


class LibraryLayer(nn.Module):
    """`nn.TransformerEncoderLayer`, causal."""

    def __init__(self, norm_first: bool = True, activation: Any = "gelu") -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            D, HEADS, HIDDEN, batch_first=True, norm_first=norm_first, activation=activation
        )

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layer(x, src_mask=mask, is_causal=True)


# -- how parameters are read -----------------------------------------------------------------------


class RawMatrices(Base):
    """`x @ self.W`, and an einsum over `[d, heads, head_dim]`."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(D, HEADS, D // HEADS) / 4) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(HEADS, D // HEADS, D) / 4)
        self.w1, self.w2 = nn.Parameter(torch.randn(D, HIDDEN) / 4), nn.Parameter(torch.randn(D, HIDDEN) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n1(x)
        q, k, v = (torch.einsum("bnd,dhe->bhne", h, w) for w in (self.wq, self.wk, self.wv))
        mixed = causal(q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + torch.einsum("bhne,hed->bnd", mixed, self.wo)
        return x + torch.tanh(self.n2(x) @ self.w1) @ self.w2.t()


class Convolved(Base):
    """`nn.Conv1d` with kernel size 1 as projections."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(D, HIDDEN, 1), nn.Conv1d(HIDDEN, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        return x + self.down(F.relu(self.up(self.n2(x).mT))).mT


class Parametrized(Base):
    """Weight norm on both projections of the MLP."""

    def __init__(self, both: bool = True) -> None:
        super().__init__()
        self.mlp = MLP(bias=False)
        nn.utils.parametrizations.weight_norm(self.mlp.down)
        if both:
            nn.utils.parametrizations.weight_norm(self.attn.o)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        return x + self.mlp(self.n2(x))


class HeadNorms(Base):
    """A norm with a weight for each head's result, before the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.o = Attention(project=False), nn.Linear(D, D, bias=False)
        self.norm, self.mlp = WrittenNorm(D // HEADS), MLP()

    def forward(self, x: Tensor) -> Tensor:
        heads = self.norm(self.attn(self.n1(x)).unflatten(-1, (HEADS, -1)))
        x = x + self.o(heads.flatten(-2))
        return x + self.mlp(self.n2(x))


class Tables(Base):
    """Known numbers: a buffer that scales, one that shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, D))
        self.register_buffer("shift", torch.linspace(-1, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        return x + self.mlp(self.n2(x)) * self.scale + self.shift


# -- experts ---------------------------------------------------------------------------------------


class ExpertList(Base):
    """Routed experts as modules in a Python loop, and a shared expert."""

    def __init__(self, experts: int = 3, chosen: int = 2) -> None:
        super().__init__()
        self.router, self.chosen = nn.Linear(D, experts, bias=False), chosen
        self.experts, self.shared = nn.ModuleList(MLP() for _ in range(experts)), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        n = self.n2(x)
        weights, places = self.router(n).softmax(-1).topk(self.chosen, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        routed = torch.zeros_like(n)
        for e, expert in enumerate(self.experts):
            share = (weights * (places == e)).sum(-1, keepdim=True)
            routed = routed + share * expert(n)
        return x + routed + self.shared(n)


class SoftExperts(Base):
    """Stacked experts, all of them for every token."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(D, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, D, HIDDEN) / 4)
        self.down = nn.Parameter(torch.randn(experts, HIDDEN, D) / 4)
        self.shared = MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        n = self.n2(x)
        weights = self.router(n).softmax(-1)
        hidden = F.silu(torch.einsum("bnd,edh->bneh", n, self.up))
        routed = torch.einsum("bneh,ehd,bne->bnd", hidden, self.down, weights)
        return x + routed + self.shared(n)


class SortedExperts(Base):
    """Each expert works on its own tokens only, as `index_add_` puts them back."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(D, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, D, HIDDEN) / 4)
        self.down = nn.Parameter(torch.randn(experts, HIDDEN, D) / 4)
        self.shared = MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        n = self.n2(x)
        flat = n.flatten(0, 1)
        weight, place = self.router(flat).softmax(-1).max(-1)
        hidden = torch.bmm(flat[:, None], self.up[place])
        routed = torch.bmm(F.silu(hidden), self.down[place])[:, 0] * weight[:, None]
        return x + routed.view_as(n) + self.shared(n)


# -- calling conventions ---------------------------------------------------------------------------


class GivesTuple(LayerScale):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x), None, {"seen": x.shape[1]}


class GivesMapping(LayerScale):
    def forward(self, *, hidden: Tensor, scale: float = 1.0) -> Any:  # type: ignore[override]
        return {"hidden": super().forward(hidden * scale)}


class TokensFirst(nn.Module):
    """`nn.TransformerEncoderLayer` with the tokens' axis first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, HEADS, HIDDEN, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[0])
        return self.layer(x, src_mask=mask, is_causal=True)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "parallel": ParallelSharedNorm,
    "layer_scale": LayerScale,
    "gated": GatedResidual,
    "highway": Highway,
    "rezero": ReZero,
    "post_norm": PostNorm,
    "sandwich": Sandwich,
    "in_place": InPlace,
    "divided": Divided,
    "no_projection": NoProjection,
    "two_mixers": TwoMixers,
    "gru": Recurrent,
    "lstm": lambda: Recurrent(nn.LSTM),
    "moving_average": MovingAverage,
    "library_attention": LibraryAttention,
    "library_layer": LibraryLayer,
    "library_layer_post": lambda: LibraryLayer(False, "relu"),
    "raw_matrices": RawMatrices,
    "convolved": Convolved,
    "parametrized": Parametrized,
    "head_norms": HeadNorms,
    "tables": Tables,
    "experts_list": ExpertList,
    "experts_soft": SoftExperts,
    "experts_sorted": SortedExperts,
    "gives_tuple": GivesTuple,
    "gives_mapping": GivesMapping,
}


# -- language models -------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, head; called as `model(ids)`."""

    def __init__(self, *blocks: nn.Module, positions: bool = False) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(IDS, D), nn.LayerNorm(D), nn.Linear(D, IDS, bias=False)
        self.positions = nn.Embedding(64, D) if positions else None
        self.build(*blocks)

    def build(self, *blocks: nn.Module) -> None:
        self.blocks = nn.ModuleList(blocks)

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1], device=ids.device))
        found: Tensor = self.head(self.norm(self.run(x)))
        return found


class Sequential(LanguageModel):
    def build(self, *blocks: nn.Module) -> None:
        self.stack = nn.Sequential(*blocks)

    def run(self, x: Tensor) -> Tensor:
        return self.stack(x)  # type: ignore[no-any-return]


class Named(LanguageModel):
    """Blocks as attributes with names of their own."""

    def build(self, *blocks: nn.Module) -> None:
        self.block1, self.block2 = blocks

    def run(self, x: Tensor) -> Tensor:
        return self.block2(self.block1(x))  # type: ignore[no-any-return]


class Nested(LanguageModel):
    """A list of lists."""

    def build(self, *blocks: nn.Module) -> None:
        half = len(blocks) // 2
        self.stages = nn.ModuleList([nn.ModuleList(blocks[:half]), nn.ModuleList(blocks[half:])])

    def run(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = block(x)
        return x


class Universal(LanguageModel):
    """One block, several times."""

    def run(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.blocks[0](x)
        return x


class Inline(LanguageModel):
    """Branches in lists of their own: attention, norms and MLPs meet in the model's own forward."""

    def build(self, *blocks: nn.Module) -> None:
        self.attention = nn.ModuleList(Attention() for _ in blocks)
        self.mlps = nn.ModuleList(MLP() for _ in blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in blocks)

    def run(self, x: Tensor) -> Tensor:
        for attention, mlp, norm in zip(self.attention, self.mlps, self.norms, strict=True):
            x = x + attention(x)
            x = x + mlp(norm(x))
        return x


MODELS: dict[str, Callable[[], nn.Module]] = {
    "list": lambda: LanguageModel(LayerScale(), LayerScale()),
    "sequential": lambda: Sequential(LayerScale(), LayerScale()),
    "named": lambda: Named(LayerScale(), LayerScale()),
    "nested": lambda: Nested(*(LayerScale() for _ in range(4))),
    "different": lambda: LanguageModel(ParallelSharedNorm(), TwoMixers(), Sandwich()),
    "last_makes_up": lambda: LanguageModel(NoProjection(mlp=False), LayerScale()),
    "positions": lambda: LanguageModel(LayerScale(), LayerScale(), positions=True),
    "inline": lambda: Inline(LayerScale(), LayerScale()),
}


class TransposedModel(LanguageModel):
    """Blocks that read `[tokens, batch, d_model]`."""

    def run(self, x: Tensor) -> Tensor:
        return super().run(x.transpose(0, 1)).transpose(0, 1)


class TuplesModel(LanguageModel):
    """Blocks that give tuples."""

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)[0]
        return x


class MappingsModel(LanguageModel):
    """Blocks that are called by keyword and give mappings."""

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(hidden=x)["hidden"]
        return x


class Library(LanguageModel):
    """`nn.TransformerEncoder`, causal."""

    def build(self, *blocks: nn.Module) -> None:
        layer = nn.TransformerEncoderLayer(D, HEADS, HIDDEN, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def run(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        found: Tensor = self.encoder(x, mask=mask, is_causal=True)
        return found


class WritesStream(Base):
    """A block that changes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        x += self.attn(self.n1(x))
        x += self.mlp(self.n2(x))
        return x


class Recycled(LanguageModel):
    """One block twice, then one of its own."""

    def run(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.blocks[0](x)
        return self.blocks[1](x)  # type: ignore[no-any-return]


MODELS |= {
    "transposed": lambda: TransposedModel(TokensFirst(), TokensFirst()),
    "tuples": lambda: TuplesModel(GivesTuple(), GivesTuple()),
    "mappings": lambda: MappingsModel(GivesMapping(), GivesMapping()),
    "library": Library,
    "writes_stream": lambda: LanguageModel(WritesStream(), WritesStream()),
    "recycled": lambda: Recycled(LayerScale(), LayerScale()),
}
