"""Models in memory: what a framework's backend does with them, and how the one for a model is found.

A backend is a value that a package registers as an entry point of the group `blockkit.in_place`, under the
name of the framework's root module (`torch`). A model's backend is the first one that is registered for a
root module of its classes, from the most derived class on; nothing is imported to find that out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, TypeVar

from ..absorbing.generation import Experiment, Settings
from ..display import short
from ..errors import BadInput, MissingDependency
from ..extras import reason
from ..graph.graph import Graph

GROUP = "blockkit.in_place"
P = TypeVar("P")  # the patch: whatever the backend makes and reads of it


@dataclass(frozen=True)
class ChangedParameter:
    """What became of one parameter.

    Attributes:
        name: as the model's own state dict has it.
        shape, dtype: of the parameter.
        how: `merged` into the weight, or kept beside it (`factored`).
        largest, norm: largest absolute value and Frobenius norm of the change, as it was asked for.
        residual: the largest difference between what was read back from the model and what was meant to be
            there (in the parameter's own dtype); zero where every number is right.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    how: str
    largest: float
    norm: float
    residual: float


@dataclass(frozen=True)
class Receipt:
    """What a patch changed in a model, and whether it is there.

    Attributes:
        parameters: all that were changed.
        validity: for which tokens the edited model is exact, in words.
        proved: whether just these changes were measured on just these weights.
    """

    parameters: tuple[ChangedParameter, ...]
    validity: str
    proved: bool = True

    __repr__ = short

    @property
    def exact(self) -> bool:
        """Whether the edit is one that was proved, and every parameter, read back, is what it was meant to be."""
        return self.proved and all(p.residual == 0 for p in self.parameters)

    def __str__(self) -> str:
        rows = [("parameter", "shape", "dtype", "how", "largest", "norm", "read back")]
        for p in self.parameters:
            shape = " x ".join(map(str, p.shape))
            back = "as meant" if p.residual == 0 else f"off by {p.residual:.3g}"
            rows.append((p.name, shape, p.dtype, p.how, f"{p.largest:.3g}", f"{p.norm:.3g}", back))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([f"{len(self.parameters)} changed parameter(s); {self.validity}", *table])


class InPlace(Protocol[P]):
    """What a framework's backend does with a model that a user already holds; `P` is `blockkit.Patch`."""

    def graphs(self, model: Any, example: Any = None) -> Mapping[str, Graph]:
        """The graphs of the model's distinct blocks, by the names of the blocks.

        Args:
            example: what the model is called with, where that cannot be guessed: an array, or a tuple or
                mapping of arguments.

        Raises:
            BadInput: no block can be found, or the example does not fit.
        """
        ...

    def absorb(self, model: Any, context: Any, query: Any, **options: Any) -> P:
        """The patch that stands in for the context; the model is left as it was.

        Args:
            context, query: token ids `[batch, n]` and `[batch, q]`, any array or nested list (or what else the
                backend's own `absorb` takes).
            options: keywords of the backend's own `absorb`: `strategy`, `tokens`, `progress` in every backend.

        Raises:
            BadInput: something given does not fit; the message says what is allowed.
            NotPatchable, ConditionViolated, ExactnessLost: see `blockkit.absorbing.algorithm.absorb`.
        """
        ...

    def experiment(self, model: Any, ids: list[int], settings: Settings) -> Experiment:
        """The generation experiment on the model, for a prompt of one sequence.

        Raises:
            BadInput: the prompt or a setting does not fit, or the framework's models cannot be generated with.
        """
        ...

    def check(self, patch: P, model: Any) -> None:
        """Refuses a model for which the patch was not made.

        Raises:
            BadInput: its class, a parameter's name or shape, or any of its values differ.
        """
        ...

    def apply(self, patch: P, model: Any, merge: bool, allow_other_weights: bool = False) -> Receipt:
        """Puts the patch on the model, or leaves the model wholly as it was.

        Args:
            merge: into the weights; False keeps the changes beside them, as factors.
            allow_other_weights: on other values than it was made for too; the receipt then claims nothing.

        Raises:
            BadInput: the patch is not for this model, or a parameter cannot be changed.
        """
        ...

    def remove(self, patch: P, model: Any) -> None:
        """Takes the patch off; every byte of every parameter is as it was before.

        Raises:
            BadInput: the patch is not on the model, or another one lies above it.
        """
        ...


def backend_of(model: Any) -> InPlace[Any]:
    """The backend of the framework that a model belongs to.

    Raises:
        BadInput: it is no model of a framework that is registered.
        MissingDependency: the backend cannot be imported.
    """
    found = _registered(entry_points)
    roots = dict.fromkeys(c.__module__.partition(".")[0] for c in type(model).__mro__)
    for root in roots:
        if root in found:
            return _loaded(found[root])
    known = ", ".join(sorted(found)) or "none is registered"
    raise BadInput(f"{type(model).__name__} {model!r:.60} is no model of a framework that blockkit knows ({known})")


@cache
def _registered(find: Callable[..., Iterable[EntryPoint]]) -> dict[str, EntryPoint]:
    """The backends by framework; looking through all that is installed takes a while."""
    return {entry.name: entry for entry in find(group=GROUP)}


def _loaded(entry: EntryPoint) -> InPlace[Any]:
    try:
        backend: InPlace[Any] = entry.load()
    except ImportError as error:
        package = entry.dist.name if entry.dist is not None else entry.module
        raise MissingDependency(
            f"the {entry.name} backend for models in memory cannot be imported ({reason(error)}); it comes from "
            f'{package}. Install what it needs with: pip install "{package}[all]"'
        ) from None
    return backend
