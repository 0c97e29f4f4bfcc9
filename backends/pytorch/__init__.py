"""Models in memory that PyTorch runs: judged, patched and restored in place.

from blockkit.backends.pytorch import absorb

patch = absorb(model, context, query)                    # ids [1, n] and [1, q]
with patch.applied(model):
    model(query, position_ids=patch.position_ids)        # what model(context + query) gave there
"""

from .absorbing import absorb
from .decoding import Sampling
from .generation import generate
from .in_place import in_place
from .patch import TorchPatch as Patch
from .traced import trace

__all__ = ["Patch", "Sampling", "absorb", "generate", "in_place", "trace"]
