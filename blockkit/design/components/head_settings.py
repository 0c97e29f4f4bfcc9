"""Settings that attention components share: rotary positions, norms of queries and keys, position biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...errors import BadInput
from ...graph.mixers.attention import HeadNorm
from ...graph.mixers.rotary import Rope, RopeKind
from ...graph.mixers.scoring import RelativeBias
from ...graph.ops import LayerNorm, RMSNorm
from ...graph.sizes import Size
from .base import Lowering, Number

FORBID = {"extra": "forbid"}


@dataclass(frozen=True)
class RopeSettings:
    """Rotary positions (arXiv 2104.09864).

    Args:
        base: of the wave lengths.
        scaling: `linear`: divides the positions.
        dim: how many coordinates of each head, the first ones, are rotated; by default all.
        interleaved: coordinates 2i and 2i + 1 form a pair (GPT-J, Cohere) in place of i and i + dim/2.
        kind: how long wave lengths are stretched: `linear`, `llama3` or `yarn`.
        factor, original_length: `llama3` and `yarn`: by how much, and the length before.
        low_freq_factor, high_freq_factor: `llama3`.
        beta_fast, beta_slow, attention_factor, truncate: `yarn`.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID
    base: Number = 10000.0
    scaling: Number = 1.0
    dim: int | str | None = None
    interleaved: bool = False
    kind: RopeKind = "linear"
    factor: Number = 1.0
    original_length: Number = 8192
    low_freq_factor: Number = 1.0
    high_freq_factor: Number = 4.0
    beta_fast: Number = 32.0
    beta_slow: Number = 1.0
    attention_factor: Number | None = None
    truncate: bool = True

    def op(self, to: Lowering, name: str, head_dim: Size) -> Rope:
        """The rotation for heads of `head_dim` coordinates.

        Raises:
            BadInput: that many coordinates cannot be rotated in pairs.
        """

        def number(key: str) -> float:
            return to.number(getattr(self, key), f"{name}.{key}")

        dim = to.size(self.dim) if self.dim is not None else head_dim
        if dim.at_most(head_dim) is False or (dim.known or 0) % 2:
            raise BadInput(f"{name}.dim: {dim} of {head_dim} coordinates cannot be rotated in pairs")
        keys = ("base", "scaling", "factor", "original_length", "low_freq_factor", "high_freq_factor", "beta_fast",
                "beta_slow")  # fmt: skip
        return Rope(
            **{key: number(key) for key in keys},
            dim=None if self.dim is None else dim,
            interleaved=self.interleaved,
            kind=self.kind,
            attention_factor=None if self.attention_factor is None else number("attention_factor"),
            truncate=self.truncate,
        )


@dataclass(frozen=True)
class QKNorm:
    """Norm of queries and keys, times (offset + scale).

    Args:
        kind: `rms` or `layer`.
        over: each `head` by itself, or `all` coordinates together, before they are split into heads (OLMo 2).
        scale: true: parameters `q_norm` and `k_norm`, which all heads share (over a head) or as wide as q and k
            (over all); `per_head`: each head has its own (Cohere); false: none.
        bias: parameters `q_norm_bias` and `k_norm_bias`, as wide, are added.
        after_rope: after the rotation, not before it.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID
    eps: Number = 1e-6
    offset: float = 0.0
    kind: Literal["rms", "layer"] = "rms"
    over: Literal["head", "all"] = "head"
    scale: bool | Literal["per_head"] = True
    bias: bool = False
    after_rope: bool = False

    def op(self, to: Lowering, name: str) -> HeadNorm:
        """The norm with its numbers put in, for the mixing operation.

        Raises:
            BadInput: settings that exclude each other.
        """
        if self.over == "all" and (self.after_rope or self.scale == "per_head"):
            raise BadInput(f"{name}: after_rope and scale: per_head are for norms over a head")
        eps = to.number(self.eps, f"{name}.eps")
        scale: Literal["shared", "per_head", "none"] = "shared" if self.scale else "none"
        return HeadNorm(
            RMSNorm(eps) if self.kind == "rms" else LayerNorm(eps),
            over=self.over,
            scale="per_head" if self.scale == "per_head" else scale,
            offset=self.offset,
            bias=self.bias,
            after_rope=self.after_rope,
        )


@dataclass(frozen=True)
class RelativeBiasSettings:
    """A learned logit for each head and bucket of distances (T5): the parameter `rel_bias [buckets, heads]`."""

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID
    buckets: int | str = 32
    max_distance: int | str = 128

    def op(self, to: Lowering, causal: bool) -> RelativeBias:
        """The bias with its numbers put in, for the mixing operation.

        Raises:
            BadInput: buckets and distances that do not fit each other.
        """
        found = RelativeBias(to.size(self.buckets), to.size(self.max_distance))
        buckets, furthest = found.buckets.known, found.max_distance.known
        if buckets is not None and (buckets < (2 if causal else 4) or buckets % (2 if causal else 4)):
            raise BadInput(f"relative_bias: buckets must be a multiple of {2 if causal else 4}, got {buckets}")
        if buckets is not None and furthest is not None and furthest <= buckets // 2:
            raise BadInput(f"relative_bias: max_distance must be above {buckets // 2}, got {furthest}")
        return found
