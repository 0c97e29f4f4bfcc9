"""`Intercepted`: a tensor that stands in a parameter's place and tells of every call that reads the parameter.

Whatever torch function a model calls, with whatever module, the call reaches `__torch_function__` of the tensors it
reads. A call of parameters alone (`1.0 + w.float()`, `W.t()`, `W[3]`) gives a tensor that remembers how it came about.
A call that brings a parameter together with a signal is an `Event`: a handler sees it and may give another result. All
results of events are plain tensors, so nothing but the parameters themselves is ever intercepted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from blockkit.errors import BadInput

from .derivation import Origin, Product, Root, Step, product


@dataclass(frozen=True, eq=False)
class Event:
    """One call that reads intercepted parameters together with a signal.

    Attributes:
        names: state-dict names of the intercepted parameters that it reads, in the order of its arguments.
        func: the torch function called.
        args, kwargs: what with; plain tensors in place of the intercepted ones.
        signals: the tensors among them that are not (derived from) intercepted parameters, in order.
    """

    names: tuple[str, ...]
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    signals: tuple[Tensor, ...]
    _given: tuple[tuple[Any, ...], Mapping[str, Any]] = field(repr=False)
    _handler: Handler = field(repr=False)

    @cached_property
    def output(self) -> Any:
        """The call's own result, computed once."""
        return self.func(*self.args, **self.kwargs)

    def with_values(self, values: Mapping[str, Tensor], wide: torch.dtype | None = None) -> Any:
        """The result of the same call with other tensors in place of the named parameters.

        What the model computes of them before the call (`1.0 + w.float()`) is computed anew.

        Args:
            wide: the dtype in which the call is to be computed: that of every floating-point argument.
        """

        def exchanged(tensor: Tensor) -> Any:
            mine = isinstance(tensor, Intercepted) and tensor.handler is self._handler
            value = _recomputed(tensor, values, self._handler) if mine else tensor
            return value.to(wide) if wide is not None and value.is_floating_point() else value

        args, kwargs = self._given
        return self.func(*_mapped(args, exchanged), **_mapped(kwargs, exchanged))

    def product(self, name: str) -> Product | None:
        """The product with the matrix parameter `name` that the call is; None if it is no plain product.

        Of a stacked parameter it may be a product with one slice: `Product.index` says which.
        """
        found = product(self.func, *self._given, name)
        if found is None:
            return None
        z, transposed, index = found
        return Product(_plain(z, self._handler), transposed, index)

    def parameter(self, name: str) -> Tensor:
        """The parameter `name` itself, as it is stored."""
        found: list[Tensor] = []
        _gather(self._given, found)
        return next(root.plain for t in found for root in _roots(t, self._handler) if root.roots == (name,))


Handler = Callable[[Event], Tensor | None]
"""Asked about every event: gives its result, or None to keep `event.output`."""


@dataclass(frozen=True, eq=False)
class OfThread:
    """A handler for the thread that made it; all others read the parameter itself.

    Attributes:
        values: in place of named parameters, for that thread, which then is not asked about their events.
    """

    handler: Handler | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    thread: int = field(default_factory=threading.get_ident)

    def __call__(self, event: Event) -> Tensor | None:
        return None if self.handler is None else self.handler(event)

    def read(self, tensor: Intercepted) -> Tensor:
        """What this thread reads of a stand-in: itself, another value, or the parameter."""
        if threading.get_ident() != self.thread:
            return tensor.plain
        return self.values.get(tensor.origin.name, tensor) if isinstance(tensor.origin, Root) else tensor


class Intercepted(Tensor):
    """A parameter, or a tensor derived from parameters alone; made by `Intercepted.of`.

    Attributes:
        plain: the tensor that it stands for.
        origin: the parameter, or the call that it came from.
        roots: the names of the parameters that it comes from (a tensor of older versions has `names` of its own).
        handler: who is asked about the events that read it.
    """

    plain: Tensor
    origin: Origin
    roots: tuple[str, ...]
    handler: Handler

    @staticmethod
    def of(parameter: Tensor, name: str, handler: Handler) -> Intercepted:
        """What stands in the parameter's place."""
        made = _made(parameter, Root(name), (name,), handler)
        made._is_param = True  # isinstance(made, nn.Parameter), as modules ask
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given: list[Tensor] = []
        _gather((args, kwargs), given)
        if all(_read(t) is t for t in given):
            return _called(func, args, kwargs or {})
        args, kwargs = _mapped(args, _read), _mapped(dict(kwargs or {}), _read)
        left: list[Tensor] = []
        _gather((args, kwargs), left)
        return _called(func, args, kwargs) if any(isinstance(t, Intercepted) for t in left) else func(*args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))

    def __deepcopy__(self, memo: dict[int, Any]) -> Intercepted:
        """A copied model keeps what is intercepted, with the same handler."""
        if (own := _read(self)) is not self:
            return deepcopy(own, memo)
        if id(self) not in memo:
            plain = _copied(self.plain, memo)
            copy = _made(plain, self.origin, self.roots, self.handler)
            copy._is_param = getattr(self, "_is_param", False)
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as what it stands for."""
        return self.plain.__reduce_ex__(protocol)


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    found = tensor.__deepcopy__(memo)
    return found if isinstance(found, Tensor) else tensor


def _made(plain: Tensor, origin: Origin, names: tuple[str, ...], handler: Handler) -> Intercepted:
    make: Callable[..., Intercepted] = Tensor._make_subclass
    made = make(Intercepted, plain, plain.requires_grad and plain.is_leaf and not plain.is_inference())
    made.plain, made.origin, made.roots, made.handler = plain, origin, names, handler
    return made


_VALUES = {Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.mH.__get__, Tensor.data.__get__}
_TEMPLATED: dict[Any, Callable[[Tensor], tuple[Any, tuple[Any, ...]]]] = {
    Tensor.type_as: lambda like: (Tensor.to, (like.dtype,)),
    Tensor.to: lambda like: (Tensor.to, (like.device, like.dtype)),
    Tensor.expand_as: lambda like: (Tensor.expand, (like.shape,)),
    Tensor.view_as: lambda like: (Tensor.view, (like.shape,)),
    Tensor.reshape_as: lambda like: (Tensor.reshape, (like.shape,)),
}
_MAKERS = {
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor, Tensor.__repr__,
    Tensor.__format__, Tensor.untyped_storage, Tensor.numpy,
}  # fmt: skip


def _read(tensor: Tensor) -> Tensor:
    """What this thread reads of a tensor."""
    while isinstance(tensor, Intercepted) and isinstance(tensor.handler, OfThread):
        below = tensor.handler.read(tensor)
        if below is tensor:
            break
        tensor = below
    return tensor


def _called(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a torch function gives: something plain about the parameter, a derived tensor, or an event's result."""
    name = getattr(func, "__name__", "")
    first = args[0] if args else None
    if name in ("__get__", "__set__"):
        if name == "__set__" or func not in _VALUES:
            return func(bare(first), *_mapped(args[1:], bare))
    elif func in _MAKERS:
        return func(*_mapped(args, bare), **_mapped(kwargs, bare))
    elif func in _TEMPLATED and len(args) == 2 and isinstance(args[1], Tensor):
        func, rest = _TEMPLATED[func](args[1])
        if not isinstance(first, Intercepted):
            return func(first, *rest)
        args = (first, *rest)
    elif func == Tensor.__getitem__ and _is_number(args[1]):
        args = (first, int(args[1]))
    elif _writes(name, kwargs):
        return _written(func, args, kwargs)
    elif func in _COMPOSED:
        return _opened(func)(*args, **kwargs)
    return _derived_or_event(func, args, kwargs)


_COMPOSED = {functional.multi_head_attention_forward}  # several products in one function


@cache
def _opened(func: FunctionType) -> Callable[..., Any]:
    """A function that torch writes in Python, such that the calls within it are told of and not it as a whole."""
    own = {**func.__globals__, "has_torch_function": lambda tensors: False}
    opened = FunctionType(func.__code__, own, func.__name__, func.__defaults__, func.__closure__)
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened


def _derived_or_event(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    found: list[Tensor] = []
    _gather((args, kwargs), found)
    mine = [t for t in found if isinstance(t, Intercepted)]
    if not mine:  # hidden in an object of the model's own
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    handler = mine[0].handler
    names = _names(mine, handler)
    plain_args, plain_kwargs = _plain(args, handler), _plain(kwargs, handler)
    others = [t for t in found if not isinstance(t, Intercepted)]
    if all(type(t) is not Tensor and isinstance(t, nn.Parameter) for t in others):
        return _derived(func(*plain_args, **plain_kwargs), Step(func, args, kwargs), names, handler)
    event = Event(names, func, plain_args, plain_kwargs, tuple(others), (args, kwargs), handler)
    result = handler(event)
    return event.output if result is None else result


def _derived(result: Any, step: Step, names: tuple[str, ...], handler: Handler) -> Any:
    """The result of a call of parameters alone, with its origin; what is no tensor stays as it is."""
    if isinstance(result, Tensor):
        return _made(result, step, names, handler)
    if isinstance(result, (tuple, list)) and any(isinstance(t, Tensor) for t in result):
        pieces = [
            _made(t, Step(step.func, step.args, step.kwargs, i), names, handler) if isinstance(t, Tensor) else t
            for i, t in enumerate(result)
        ]
        return type(result)(pieces)
    return result


def _recomputed(tensor: Intercepted, values: Mapping[str, Tensor], handler: Handler) -> Tensor:
    """The tensor, derived from other values of the parameters."""
    if not any(name in values for name in tensor.roots):
        return tensor.plain
    origin = tensor.origin
    if isinstance(origin, Root):
        return values[origin.name]

    def exchanged(part: Tensor) -> Tensor:
        mine = isinstance(part, Intercepted) and part.handler is handler
        return _recomputed(part, values, handler) if mine else part

    result = origin.func(*_mapped(origin.args, exchanged), **_mapped(origin.kwargs, exchanged))
    return result if origin.item is None else result[origin.item]


def _roots(tensor: Tensor, handler: Handler) -> Iterator[Intercepted]:
    """The intercepted parameters that a tensor comes from."""
    if isinstance(tensor, Intercepted) and tensor.handler is handler:
        if isinstance(tensor.origin, Root):
            yield tensor
        else:
            found: list[Tensor] = []
            _gather((tensor.origin.args, tensor.origin.kwargs), found)
            for part in found:
                yield from _roots(part, handler)


def _writes(name: str, kwargs: Mapping[str, Any]) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or name in _AUGMENTED or kwargs.get("out") is not None


_AUGMENTED = {
    f"__i{name}__": f"__{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
}


def _written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A call that writes into its first argument (or `out`), as a call that does not, and then the writing."""
    if kwargs.get("out") is not None:
        rest = {k: v for k, v in kwargs.items() if k != "out"}
        return kwargs["out"].copy_(bare(_derived_or_event(func, args, rest)))
    target = args[0]
    if not isinstance(target, Tensor):  # an optimiser, on many parameters at once
        return func(*_mapped(args, bare), **_mapped(kwargs, bare))
    name = getattr(func, "__name__", str(func))
    if not isinstance(target, Intercepted):
        pure = getattr(Tensor, _AUGMENTED.get(name, name.removesuffix("_")), None)
        return target.copy_(bare(_derived_or_event(_on_copy(func) if pure in (None, func) else pure, args, kwargs)))
    if isinstance(target.origin, Root):  # an optimiser, or a checkpoint that is loaded: the parameter itself is meant
        func(target.plain, *_mapped(args[1:], bare), **_mapped(kwargs, bare))
        return target
    raise BadInput(
        f"the model changes in place ({name}) what it computed of {', '.join(target.roots)}; that cannot be followed"
    )


def _on_copy(func: Callable[..., Any]) -> Callable[..., Any]:
    def called(target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = target.clone()
        func(copy, *args, **kwargs)
        return copy

    return called


def _is_number(index: Any) -> bool:
    """A whole number that was left in a tensor, as loops over experts do."""
    return type(index) is Tensor and index.dim() == 0 and index.dtype in (torch.int64, torch.int32)


def _names(mine: Sequence[Intercepted], handler: Handler) -> tuple[str, ...]:
    if len(mine) == 1:
        return mine[0].roots
    return tuple(dict.fromkeys(name for t in mine if t.handler is handler for name in t.roots))


def _gather(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    elif type(value) is tuple or type(value) is list:
        for v in value:
            _gather(v, found)
    elif type(value) is dict:
        for v in value.values():
            _gather(v, found)


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nest of lists, tuples and mappings with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)([_mapped(v, change) for v in value])
    if type(value) is dict:
        return {k: _mapped(v, change) for k, v in value.items()}
    return value


def _plain(value: Any, handler: Handler) -> Any:
    """The same nest with plain tensors in place of those that the handler is asked about."""
    kind = type(value)
    if kind is Intercepted:
        return value.plain if value.handler is handler else value
    if kind is tuple or kind is list:
        return kind([_plain(v, handler) for v in value])
    if kind is dict:
        return {k: _plain(v, handler) for k, v in value.items()}
    return value


def bare(tensor: Any) -> Any:
    """The tensor itself, under whatever stands in its place."""
    while isinstance(tensor, Intercepted):
        tensor = tensor.plain
    return tensor
