"""A static patch that grows by one token at a time and leaves all earlier tokens as they are.

A new token's input h has a part orthogonal to all earlier inputs, h' = h - Q^T Q h. The change (t - W h) h'^T / |h'|^2
gives the new token its target and adds nothing to what earlier tokens read, so their cached keys and values stay valid.
Q and the rows beside it are kept in float64 and orthogonalised twice; nothing is merged on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from blockkit.errors import ConditionViolated, NotPatchable
from blockkit.graph.changes import MatrixChange
from blockkit.planner.route import Step

from ..absorbing.lockstep import Solver
from ..blocks.translate import Tap
from ..editing.changed import wide_dtype
from ..watching.intercepted import Event
from ..watching.observe import Chosen

DEPENDENT = 1e-7  # relative length of an input's new part up to which there is none


@dataclass
class Grown:
    """One matrix's change so far: `left [rank, d_out]`, orthonormal rows `right [rank, d_in]`, float64; and in use."""

    left: np.ndarray
    right: np.ndarray
    amplification: float = 1.0
    tensors: tuple[Tensor, Tensor] | None = None

    def on(self, result: Tensor, z: Tensor) -> Tensor:
        """The product's `result [..., d_out]` on `z [..., d_in]` with what the change adds, still unrounded."""
        wide = wide_dtype(z)
        if self.tensors is None or len(self.tensors[0]) != len(self.left):
            self.tensors = (
                torch.as_tensor(self.left, dtype=wide, device=z.device),
                torch.as_tensor(self.right, dtype=wide, device=z.device),
            )
        left, right = self.tensors
        return result.to(wide) + (z.to(wide) @ right.t()) @ left

    def grow(self, z: np.ndarray, wanted: np.ndarray) -> bool:
        """Takes up one more token, `z [d_in]` whose product is to grow by `wanted [d_out]`; whether it can.

        A token that asks for nothing counts too: later ones must leave its product as it is.
        """
        length = float(np.linalg.norm(z))
        new = z - self.right.T @ (self.right @ z)
        new = new - self.right.T @ (self.right @ new)
        size = float(np.linalg.norm(new))
        if not size > DEPENDENT * length:
            return not wanted.any()
        if wanted.any():
            self.amplification = max(self.amplification, length / size)
        self.right = np.concatenate([self.right, new[None] / size])
        self.left = np.concatenate([self.left, wanted[None] / size])
        return True


@dataclass
class Grower(Solver):
    """The reduced run of one more token, which grows every block's change as it goes.

    Attributes:
        grown: the changes so far, by the parameter's name in the state dict.
    """

    grown: dict[str, Grown] = field(default_factory=dict)
    stop: bool = True

    def read(self, tap: Tap, event: Event) -> Tensor | None:
        """See `Solver`."""
        chosen = self.using.get(self.place)
        steps = [s for s in chosen.plan.route.steps if s.parameter in tap.parameters] if chosen is not None else []
        if chosen is None or not steps:
            self.note(tap, event, event.output)
            return None
        if len(steps) > 1 or not steps[0].is_matrix:
            raise NotPatchable(f"{steps[0].parameter} cannot grow: one matrix a call can; choose strategy='joint'")
        output = event.output
        name = self.traced.blocks[self.place].full(steps[0].parameter)
        product = event.product(name)
        if product is None:
            raise NotPatchable(f"{name} is not read as a matrix product, so its change cannot grow")
        if name in self.grown:
            output = self.grown[name].on(output, product.z)
        self.note(tap, event, output)
        self._grow(chosen, steps[0], name)
        output = self.grown[name].on(event.output, product.z).to(event.output.dtype)
        self.seen[self.place].shown[tap.output[0]] = self.rows.of(output, tap.output[1]).clone()
        self.strategies.add(chosen.plan.strategy)
        return output

    def _grow(self, chosen: Chosen, step: Step, name: str) -> None:
        change = self.solved(chosen, step)
        if not isinstance(change, MatrixChange):
            raise NotPatchable(f"{step.parameter} cannot grow: it is no matrix; choose strategy='joint'")
        if name not in self.grown:
            self.grown[name] = Grown(np.asarray(change.left), np.asarray(change.right))
            if len(change.right) == 1:
                size = float(np.linalg.norm(change.right))
                self.grown[name] = Grown(change.left * size, change.right / (size or 1.0))
            return
        z = np.asarray(change.right)
        for row, wanted in zip(z, np.asarray(change.left), strict=True):
            squares = float(row @ row)
            if squares and not self.grown[name].grow(row / squares, wanted):
                raise ConditionViolated(
                    f"{name}: the new token's input lies in the span of the earlier ones, so one static matrix cannot "
                    "serve it too; absorb it with tokens='each'",
                    node=step.last.node, parameter=name,
                )  # fmt: skip
