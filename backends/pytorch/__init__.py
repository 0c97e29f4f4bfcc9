"""Models in memory that PyTorch runs: judged, patched and restored in place.

from blockkit.backends.pytorch import absorb

patch = absorb(model, context, query)                    # ids [1, n] and [1, q]
with patch.applied(model):
    model(query, position_ids=patch.position_ids)        # what model(context + query) gave there
"""

from blockkit.extras import missing

try:
    from .absorbing.absorb import absorb
    from .blocks.traced import trace
    from .editing.patch import TorchPatch as Patch
    from .generating.decoding import Sampling
    from .generating.generate import generate
    from .in_place import in_place
except ImportError as error:
    raise missing("torch", error) from error

__all__ = ["Patch", "Sampling", "absorb", "generate", "in_place", "trace"]
