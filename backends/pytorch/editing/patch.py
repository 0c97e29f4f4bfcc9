"""The core's patch with what a model in PyTorch is called with."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor

from blockkit.errors import BadInput, blamed
from blockkit.patch.patch import Patch


@dataclass(frozen=True, eq=False, repr=False)
class TorchPatch(Patch):
    """See `blockkit.Patch`; positions are a tensor, to be passed on.

    Attributes:
        device: where the model was when the patch was made.
    """

    device: str = field(default="cpu", compare=False)

    @property
    def query_ids(self) -> Tensor:
        """The query, `[batch, tokens]`, int64."""
        return torch.as_tensor(super().query_ids, device=self.device)

    @property
    def position_ids(self) -> Tensor:
        """The query's positions, `[batch, tokens]`, int64."""
        return torch.as_tensor(super().position_ids, device=self.device)

    @staticmethod
    def load(path: str | Path, device: str = "cpu") -> TorchPatch:
        """Reads a patch file; see `blockkit.Patch.load`.

        Raises:
            BadInput: as there; or there is no such device.
        """
        try:
            torch.empty(0, device=device)
        except Exception as error:  # torch says it in several ways
            raise BadInput(f"device={device!r:.40} cannot be used: {blamed(error)}") from None
        core = Patch.load(path)
        return TorchPatch(**{f.name: getattr(core, f.name) for f in fields(core)}, device=device)
