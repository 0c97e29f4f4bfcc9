"""Patches: a context as changed parameters, and the files that carry them.

A file is safetensors: two factors for a matrix, a shift for a vector, never a dense change. Its header
says which weights it was made for, for which tokens it is exact, and what error was measured.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import Model, stored_name
from .errors import BadInput
from .overlay import Change, MatrixChange, VectorChange, dense
from .request import MODES
from .weights.folder import write_folder

FORMAT = "1"
FACTS = {
    "made_for": dict,
    "strategy": str,
    "tokens": str,
    "context_length": int,
    "query": list,
    "dtype": str,
    "measured": dict,
}


@dataclass(frozen=True)
class Patch:
    """Changed parameters of one model, exact for named tokens.

    Attributes:
        changes: by slot (`layers.3.mlp.down_proj`); float32.
        made_for: fingerprint of the model: its architecture and a hash of the weights that change.
        strategy: how the parameters were chosen.
        tokens: `last`, `each` or `all`.
        context_length: positions before the query; the query runs at positions from here on.
        query: the token ids for which the patch is exact, in this order.
        dtype: in which the model ran when the patch was made.
        measured: error of the edited model's ordinary run (`linf`, `tvd`, `top1_agree`).
    """

    changes: Mapping[str, Change]
    made_for: Mapping[str, str]
    strategy: str
    tokens: str
    context_length: int
    query: tuple[int, ...]
    dtype: str
    measured: Mapping[str, float]
    source: str = field(default="", compare=False)

    @property
    def position_ids(self) -> np.ndarray:
        """The query's positions, `[1, tokens]`."""
        return np.arange(self.context_length, self.context_length + len(self.query))[None]

    @property
    def validity(self) -> str:
        """For which tokens the patch is exact, in words."""
        served = {"last": "the last token", "each": "every token, each with its own patch", "all": "every token"}
        start, stop = self.context_length, self.context_length + len(self.query) - 1
        where = f"one query of {len(self.query)} token(s), at positions {start} to {stop}"
        return f"exact for {served[self.tokens]} of {where}"

    @staticmethod
    def of(absorbed: Any, model: Model, dtype: str) -> Patch:
        """The patch of an `Absorbed` context, with the fingerprint of the model it was made for."""
        changes = {
            stored_name(model.architecture, layer, name): _narrow(change)
            for layer, overlay in absorbed.overlays.items()
            for name, change in overlay.items()
        }
        request = absorbed.request
        measured = {k: getattr(absorbed.measured, k) for k in ("linf", "tvd", "top1_agree")}
        strategies = {p.strategy for p in absorbed.plans.values()}
        return Patch(
            changes,
            model.fingerprint(list(changes)),
            ", ".join(sorted(strategies)),
            request.tokens,
            len(request.context),
            tuple(int(i) for i in request.query),
            dtype,
            measured,
        )

    def save(self, path: str | Path) -> None:
        """Writes the patch; an existing file is replaced only when the new one is complete.

        Raises:
            BadInput: the file cannot be written.
        """
        from safetensors.numpy import save

        target = Path(path)
        header = {
            "format": f"blockkit-patch {FORMAT}",
            "validity": self.validity,
            "patch": json.dumps(
                {
                    "made_for": dict(self.made_for), "strategy": self.strategy, "tokens": self.tokens,
                    "context_length": self.context_length, "query": list(self.query), "dtype": self.dtype,
                    "measured": dict(self.measured),
                }
            ),
        }  # fmt: skip
        partial = target.with_name(f".{uuid.uuid4().hex[:12]}.partial") if target.name else target
        try:
            if target.exists() and not target.is_file():
                raise BadInput(f"cannot write {target}: it exists and is not an ordinary file")
            try:
                with partial.open("xb") as file:
                    file.write(save(_tensors(self.changes), header))
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise BadInput(f"cannot write {target}: {error.strerror or error}") from None

    @staticmethod
    def load(path: str | Path) -> Patch:
        """Reads a patch file.

        Raises:
            BadInput: no such file, not a patch, or of a format that this version does not know.
        """
        from safetensors import SafetensorError, safe_open

        source = Path(path)
        try:
            if not source.is_file():
                raise BadInput(f"no patch file at {source}")
            with safe_open(source, framework="np") as file:
                header = file.metadata() or {}
                ours = header.get("format") == f"blockkit-patch {FORMAT}"
                tensors = {key: file.get_tensor(key) for key in file.keys()} if ours else {}  # noqa: SIM118
        except (SafetensorError, OSError, TypeError) as error:
            raise BadInput(f"{source} is not a readable safetensors file: {error}") from None
        if not ours:
            found = header.get("format", "no format at all")
            raise BadInput(f"{source} is not a patch of format {FORMAT} (its header says {found})")
        try:
            facts = _facts(header["patch"])
            return Patch(_changes(tensors, facts["tokens"] == "each"), **facts, source=str(source))
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{source}: its header or tensors are damaged ({error})") from None

    def check(self, model: Model) -> None:
        """Refuses a model for which the patch was not made.

        Raises:
            BadInput: the architecture, a shape or the weights differ; the message names what.
        """
        mine, its = self.made_for.get("architecture"), model.architecture.name
        if mine != its:
            raise BadInput(f"the patch was made for {mine}, this model is {its} ({model.folder.path})")
        for slot, change in self.changes.items():
            if slot not in model.parts:
                raise BadInput(f"the patch changes {slot}, which this model ({model.folder.path}) does not have")
            mine_shape, its_shape = _shape(change), model.parameter(slot).shape
            if mine_shape != its_shape:
                raise BadInput(f"the patch's change of {slot} has the shape {mine_shape}, this model's is {its_shape}")
        found = model.fingerprint(list(self.changes))
        if found["weights"] != self.made_for.get("weights"):
            raise BadInput(
                f"the patch was made for other weights than those in {model.folder.path}: "
                "the hash of the weights that it changes differs"
            )

    def require_mergeable(self) -> None:
        """Refuses a patch that has no merged form.

        Raises:
            BadInput: it holds different values for every token.
        """
        if self.tokens == "each":
            raise BadInput("a patch of --tokens each holds different values for every token; it cannot be merged")

    def merge_into(self, model: Model, out: Path) -> None:
        """Writes the model with the patch merged, as an ordinary Hugging Face checkpoint.

        Raises:
            BadInput: a wrong model, a patch that has no merged form, or a folder that cannot be written.
        """
        self.require_mergeable()
        self.check(model)
        merged = {slot: dense(model.parameter(slot), change) for slot, change in self.changes.items()}
        write_folder(model.folder, out, model.rewritten(merged))


def _narrow(change: Change) -> Change:
    """The change as files hold it: float32."""
    if isinstance(change, MatrixChange):
        left, right = (np.ascontiguousarray(f, np.float32) for f in (change.left, change.right))
        return MatrixChange(left, right, change.per_token)
    return VectorChange(np.ascontiguousarray(change.delta, np.float32), change.per_token)


def _tensors(changes: Mapping[str, Change]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for slot, change in changes.items():
        each = ".each" if change.per_token else ""
        if isinstance(change, MatrixChange):
            found[f"{slot}{each}.left"], found[f"{slot}{each}.right"] = change.left, change.right
        else:
            found[f"{slot}{each}.delta"] = change.delta
    return found


def _shape(change: Change) -> tuple[int, ...]:
    """The shape of the parameter that a static change fits."""
    if isinstance(change, MatrixChange):
        return change.left.shape[-1], change.right.shape[-1]
    return change.delta.shape


def _facts(text: str) -> dict[str, Any]:
    """What the header says of a patch.

    Raises:
        KeyError, TypeError, ValueError: it is damaged.
    """
    facts = json.loads(text)
    for name, kind in FACTS.items():
        if not isinstance(facts[name], kind):
            raise ValueError(f"{name} is {facts[name]!r:.40}")
    if facts["tokens"] not in MODES or facts["context_length"] < 1 or not facts["query"]:
        raise ValueError("tokens, context_length or query is out of range")
    return {**facts, "query": tuple(int(i) for i in facts["query"])}


def _changes(tensors: Mapping[str, np.ndarray], each: bool) -> dict[str, Change]:
    """The changes that the tensors of a file hold.

    Raises:
        KeyError, ValueError: a tensor is missing, or is none that a patch of this kind holds.
    """
    found: dict[str, Change] = {}
    for key, value in tensors.items():
        stem, part = key.rsplit(".", 1)
        slot, per_token = stem.removesuffix(".each"), stem.endswith(".each")
        if per_token != each or value.dtype != np.float32 or not np.isfinite(value).all():
            raise ValueError(f"the tensor {key} does not hold what a patch of its kind does")
        if part == "left":
            right = tensors[f"{stem}.right"]
            if value.ndim != 2 or right.ndim != 2 or len(value) != len(right):
                raise ValueError(f"the factors of {slot} do not fit each other")
            found[slot] = MatrixChange(value, right, per_token)
        elif part == "delta":
            found[slot] = VectorChange(value, per_token)
        elif part != "right":
            raise ValueError(f"unknown tensor {key}")
    return found
