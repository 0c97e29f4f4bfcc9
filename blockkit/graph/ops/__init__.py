"""The operations that nodes carry out: primitives, routing, what looks at other tokens, and a user's own.

Each operation declares its shape rule, its forward, and the law of each of its arguments; the planner composes them.
Imports the rest of `blockkit.graph`, except graphs themselves and their evaluation.
"""

from .activations import FUNCTIONS, LEAK, Activation, Function, Softcap, Softmax, apply_function
from .arithmetic import Add, MatMul, Multiply, Scale
from .base import Argument, Op, Shape, Vanish, show_shape
from .norms import LayerNorm, RMSNorm
from .unknown import Mix, Opaque
from .windows import Concat, Slice

__all__ = [
    "FUNCTIONS",
    "LEAK",
    "Activation",
    "Add",
    "Argument",
    "Concat",
    "Function",
    "LayerNorm",
    "MatMul",
    "Mix",
    "Multiply",
    "Op",
    "Opaque",
    "RMSNorm",
    "Scale",
    "Shape",
    "Slice",
    "Softcap",
    "Softmax",
    "Vanish",
    "apply_function",
    "show_shape",
]
