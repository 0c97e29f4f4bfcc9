"""State-space recurrences: the selective scan of Mamba, and Mamba-2's with one decay a head.

Both discretise the same system: over a time step d_t > 0 the state decays by exp(d_t A), A = -exp(A_log),
and takes in d_t B_t u_t; a token reads C_t h_t + D u_t. They run in float32 or wider, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import BadInput
from ..arrays import Array, Arrays, wide_dtype
from ..ops import Argument, Shape
from ..ops.mixing import MixingOp
from ..sizes import Size
from .checks import check_count, check_matrix, check_shape


@dataclass(frozen=True)
class SelectiveScan(MixingOp):
    """h_t = exp(d_t A) h_{t-1} + (d_t u_t) B_t, y_t = C_t h_t + D u_t: a state for every channel (arXiv 2312.00752).

    Arguments: `u [tokens, inner]`, time steps `[tokens, inner]` before their softplus, `B` and `C [tokens, state]`;
    parameters `A_log [inner, state]` and `D [inner]`.
    """

    kind: ClassVar[str] = "selective_scan"

    @property
    def signals(self) -> int:
        return 4

    def infer(self, args: Sequence[Argument]) -> Shape:
        """`[inner]`; see `Op.infer`."""
        names = ("u", "the time step", "B", "C", "A_log", "D")
        check_count(self.kind, args, names)
        check_matrix(self.kind, "A_log", args[4])
        inner, state = args[0].width, args[4].shape[1]
        shapes: list[Shape] = [(inner,), (inner,), (state,), (state,), (inner, state), (inner,)]
        for name, argument, shape in zip(names, args, shapes, strict=True):
            check_shape(self.kind, name, argument, shape)
        return (inner,)

    def sequence(self, xp: Arrays, args: Sequence[Any], positions: Array) -> Array:
        """See `MixingOp.sequence`."""
        dtype = xp.dtype_of(args[0])
        wide = wide_dtype(dtype)
        u, time, b, c, a_log, d = (xp.cast(a, wide) for a in args)
        inner, state = (int(s) for s in a_log.shape)
        rate, time = -xp.exp(a_log), xp.softplus(time)

        def step(h: Array, row: Any) -> tuple[Array, Array]:
            u_t, d_t, b_t, c_t = row
            decay = xp.exp(xp.reshape(d_t, (inner, 1)) * rate)
            h = decay * h + xp.reshape(d_t * u_t, (inner, 1)) * xp.reshape(b_t, (1, state))
            return h, xp.reshape(xp.matmul(h, xp.reshape(c_t, (state, 1))), (inner,))

        read = xp.scan(step, xp.asarray(np.zeros((inner, state)), wide), [u, time, b, c])
        return xp.cast(read + d * u, dtype)


@dataclass(frozen=True)
class DualScan(MixingOp):
    """The state-space dual scan: as the selective scan, with one time step and one decay a head (arXiv 2405.21060).

    Arguments: `u [tokens, heads*head_dim]`, time steps `[tokens, heads]` before their softplus, `B` and
    `C [tokens, groups*state]` (each group serves heads/groups heads); parameters `A_log` and `D [heads]`.
    """

    groups: Size
    state: Size
    kind: ClassVar[str] = "dual_scan"

    @property
    def signals(self) -> int:
        return 4

    def infer(self, args: Sequence[Argument]) -> Shape:
        """`[heads*head_dim]`; see `Op.infer`."""
        names = ("u", "the time step", "B", "C", "A_log", "D")
        check_count(self.kind, args, names)
        heads, read = args[4].shape[0], self.groups * self.state
        shapes: list[Shape] = [(heads,), (read,), (read,), (heads,), (heads,)]
        for name, argument, shape in zip(names[1:], args[1:], shapes, strict=True):
            check_shape(self.kind, name, argument, shape)
        for what, whole, share in (("the width", args[0].width, heads), ("heads", heads, self.groups)):
            if whole.known is not None and share.known and whole.known % share.known:
                raise BadInput(f"{self.kind}: {what} = {whole} cannot be shared evenly by {share}")
        return args[0].shape

    def sequence(self, xp: Arrays, args: Sequence[Any], positions: Array) -> Array:
        """See `MixingOp.sequence`."""
        dtype, groups = xp.dtype_of(args[0]), self.groups.known or 1
        wide = wide_dtype(dtype)
        u, time, b, c, a_log, d = (xp.cast(a, wide) for a in args)
        n, inner, heads, state = int(u.shape[0]), int(u.shape[1]), int(time.shape[1]), int(b.shape[1]) // groups
        each, dim = heads // groups, inner // heads
        time = xp.softplus(time)
        decay = xp.reshape(xp.exp(-time * xp.exp(a_log)), (n, groups, each, 1, 1))
        split = xp.reshape(u, (n, heads, dim))
        taken = xp.reshape(split * xp.reshape(time, (n, heads, 1)), (n, groups, each, dim, 1))
        written, asked = xp.reshape(b, (n, groups, 1, 1, state)), xp.reshape(c, (n, groups, state, 1))

        def step(h: Array, row: Any) -> tuple[Array, Array]:
            decay_t, taken_t, b_t, c_t = row
            h = decay_t * h + taken_t * b_t
            return h, xp.reshape(xp.matmul(xp.reshape(h, (groups, each * dim, state)), c_t), (inner,))

        start = xp.asarray(np.zeros((groups, each, dim, state)), wide)
        read = xp.scan(step, start, [decay, taken, written, asked])
        return xp.cast(read + xp.reshape(split * xp.reshape(d, (heads, 1)), (n, inner)), dtype)
