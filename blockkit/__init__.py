"""blockkit: is a block patchable, by which parameters, and what is the patch?

    import blockkit as bk

    x = bk.stream()
    v = x + bk.Attention(bk.RMSNorm(x), heads=4, head_dim=16)
    block = bk.Block(v + bk.GatedMLP(bk.RMSNorm(v), hidden=256), width=64)
    print(bk.check(block))
    print(bk.plan(block, strategy="paper"))

    patch = bk.absorb(model, tokenizer, "the context", " a query")      # or a name: bk.absorb("gemma3-270m", ...)

Nothing is imported here before it is asked for; frameworks only where a backend is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import display

if TYPE_CHECKING:
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
    from .jobs import absorb, export, generate
    from .patch.patch import Patch
    from .planner.controls import controls
    from .planner.plan import Plan
    from .planner.verdict import Verdict
    from .session import Session
    from .trials.verify import Verification, verify
    from .views.picture import Picture, draw

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

_MODULES = {
    "api": "check explain load plan replace_constants schema",
    "comparison": "compare",
    "design.architecture": "Architecture Block Embedding Head Layers",
    "design.components": (
        "MLP Activation Add Attention Bias Component Concat CrossAttention Gain GatedMLP LatentAttention LayerNorm "
        "Linear Mixer Operation Product QKNorm RelativeBiasSettings RMSNorm RopeSettings Scale Signal Slice Softcap "
        "Softmax stream"
    ),
    "errors": "BadInput BlockkitError ConditionViolated ExactnessLost MissingDependency NotPatchable",
    "graph.graph": "Graph Node Parameter",
    "graph.ops.declaration": "solves",
    "patch.patch": "Patch",
    "planner.controls": "controls",
    "planner.plan": "Plan",
    "planner.verdict": "Verdict",
    "jobs": "absorb export generate",
    "session": "Session",
    "trials.verify": "Verification verify",
    "views.picture": "Picture draw",
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names.split()}


display.when_asked(lambda: import_module(".views.notebook", __name__).register())


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
