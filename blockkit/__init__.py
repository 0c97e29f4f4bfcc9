"""blockkit: is a block patchable, by which parameters, and what is the patch?

    import blockkit as bk

    x = bk.stream()
    v = x + bk.Attention(bk.RMSNorm(x), heads=4, head_dim=16)
    block = bk.Block(v + bk.GatedMLP(bk.RMSNorm(v), hidden=256), width=64)
    print(bk.check(block))
    print(bk.plan(block, strategy="paper"))

Nothing heavy is imported here; frameworks only where a backend is asked for.
"""

from .api import check, load, plan, replace_constants, schema
from .architecture import Architecture, Block, Embedding, Head, Layers
from .components import (
    MLP,
    Activation,
    Add,
    Attention,
    Bias,
    Gain,
    GatedMLP,
    LayerNorm,
    Linear,
    Mixer,
    Product,
    QKNorm,
    RMSNorm,
    RopeSettings,
    Scale,
    Softcap,
    stream,
)
from .errors import (
    BadInput,
    BlockkitError,
    ConditionViolated,
    ExactnessLost,
    MissingDependency,
    NotPatchable,
)
from .graph import Graph, Node, Parameter
from .patch import Patch
from .plan import Plan
from .verdict import Verdict

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "Activation",
    "Add",
    "Architecture",
    "Attention",
    "BadInput",
    "Bias",
    "Block",
    "BlockkitError",
    "ConditionViolated",
    "Embedding",
    "ExactnessLost",
    "Gain",
    "GatedMLP",
    "Graph",
    "Head",
    "LayerNorm",
    "Layers",
    "Linear",
    "MissingDependency",
    "Mixer",
    "Node",
    "NotPatchable",
    "Parameter",
    "Patch",
    "Plan",
    "Product",
    "QKNorm",
    "RMSNorm",
    "RopeSettings",
    "Scale",
    "Softcap",
    "Verdict",
    "check",
    "load",
    "plan",
    "replace_constants",
    "schema",
    "stream",
]
