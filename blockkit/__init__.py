"""blockkit: is a block patchable, by which parameters, and what is the patch?

    import blockkit as bk

    x = bk.stream()
    v = x + bk.Attention(bk.RMSNorm(x), heads=4, head_dim=16)
    block = bk.Block(v + bk.GatedMLP(bk.RMSNorm(v), hidden=256), width=64)
    print(bk.check(block))
    print(bk.plan(block, strategy="paper"))

    patch = bk.absorb(model, tokenizer, "the context", " a query")      # or a name: bk.absorb("gemma3-270m", ...)

Nothing heavy is imported here; frameworks only where a backend is asked for. `absorb`, `generate`, `export` and
`Session` are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .api import check, explain, load, plan, replace_constants, schema
from .comparison import compare
from .design.architecture import Architecture, Block, Embedding, Head, Layers
from .design.components import (
    MLP,
    Activation,
    Add,
    Attention,
    Bias,
    Component,
    Concat,
    CrossAttention,
    Gain,
    GatedMLP,
    LatentAttention,
    LayerNorm,
    Linear,
    Mixer,
    Operation,
    Product,
    QKNorm,
    RelativeBiasSettings,
    RMSNorm,
    RopeSettings,
    Scale,
    Signal,
    Slice,
    Softcap,
    Softmax,
    stream,
)
from .errors import BadInput, BlockkitError, ConditionViolated, ExactnessLost, MissingDependency, NotPatchable
from .graph.graph import Graph, Node, Parameter
from .graph.ops.declaration import solves
from .patch.patch import Patch
from .planner.controls import controls
from .planner.plan import Plan
from .planner.verdict import Verdict
from .trials.verify import Verification, verify
from .views import notebook
from .views.picture import Picture, draw

if TYPE_CHECKING:
    from .jobs import absorb, export, generate
    from .session import Session

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
    "Component",
    "Concat",
    "ConditionViolated",
    "CrossAttention",
    "Embedding",
    "ExactnessLost",
    "Gain",
    "GatedMLP",
    "Graph",
    "Head",
    "LatentAttention",
    "LayerNorm",
    "Layers",
    "Linear",
    "MissingDependency",
    "Mixer",
    "Node",
    "NotPatchable",
    "Operation",
    "Parameter",
    "Patch",
    "Picture",
    "Plan",
    "Product",
    "QKNorm",
    "RMSNorm",
    "RelativeBiasSettings",
    "RopeSettings",
    "Scale",
    "Session",
    "Signal",
    "Slice",
    "Softcap",
    "Softmax",
    "Verdict",
    "Verification",
    "absorb",
    "check",
    "compare",
    "controls",
    "draw",
    "explain",
    "export",
    "generate",
    "load",
    "plan",
    "replace_constants",
    "schema",
    "solves",
    "stream",
    "verify",
]

_LATE = {"Session": "session", "absorb": "jobs", "export": "jobs", "generate": "jobs"}

notebook.register()


def __getattr__(name: str) -> Any:
    """The names that are imported when they are first used."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
