"""Patches: a context as changed parameters, and what is done with them.

A patch holds two factors for a matrix and a shift for a vector, never a dense change; beside them, which
weights it was made for, for which tokens it is exact, and what error was measured. `patch_file.py` has its file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..checkpoint.folder import write_folder
from ..checkpoint.model import Model, stored_name
from ..display import figure, tagged
from ..errors import BadInput, BlockkitError
from ..graph.changes import Change, dense, narrowed, shape_of
from ..graph.graph import Globs, globs, listed
from .file import read_patch, write_patch
from .in_place import Receipt, backend_of
from .table import Table, layer_of, table_of


@dataclass(frozen=True, eq=False)
class Patch:
    """Changed parameters of one model, exact for named tokens.

    A model in memory is edited by `apply` and restored by `remove`, or inside `with patch.applied(model):`; a model
    saved there (`model.save_pretrained(folder)`) is an ordinary checkpoint with the patch merged.

    Attributes:
        changes: by slot; float32 (float64 for a model in float64), in the orientation y = W z. A slot is a parameter
            of the kit's own models (`layers.3.mlp.down_proj`), or the name that a model in memory has for it
            (`NAME[e]`: for the slice `e` along its first axis, as of one expert).
        made_for: fingerprint of the model: its architecture and a hash of the weights that change.
        strategy: how the parameters were chosen.
        tokens: `last`, `each` or `all`.
        context_length: positions before the query, which runs from here on (of several prompts: the most).
        query: the token ids for which the patch is exact, in this order: `batch` prompts of one length; all -1 where
            the query was embeddings.
        dtype: in which the model ran when the patch was made.
        measured: error of the edited model's ordinary run (`linf`, `tvd`, `top1_agree`).
        batch: how many prompts the query is. A per-token change then has a row for each token, or for each prompt.
        padding: how many tokens on the left of each prompt are no tokens; empty where there are none.
        positions: the query's positions, as `query` is; empty where all follow `context_length` others.
        transposed: slots whose stored tensor is `[d_in, d_out]`.
        tensors: for a patch of the kit's own models, the weights of the checkpoint that are a slot and nothing
            else; None where the slots are the model's own names.
        merged: whether it was solved, and measured, for changes rounded into the weights; if not, for changes kept
            beside them as factors.
        whole: of a part of a patch (see `subset`), the slots of the patch that it was taken from; else empty.
    """

    changes: Mapping[str, Change]
    made_for: Mapping[str, str]
    strategy: str
    tokens: str
    context_length: int
    query: tuple[int, ...]
    dtype: str
    measured: Mapping[str, float]
    batch: int = 1
    padding: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    transposed: tuple[str, ...] = ()
    tensors: Mapping[str, str] | None = None
    merged: bool = True
    whole: tuple[str, ...] = ()
    source: str = field(default="", compare=False)

    def __repr__(self) -> str:
        error = f", linf {self.measured['linf']:.2g}" if "linf" in self.measured else ""
        return tagged(self, f"{len(self.changes)} changed parameter(s), {self.strategy}; {self.validity}{error}")

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    @property
    def query_ids(self) -> np.ndarray:
        """The query, `[batch, tokens]`."""
        return np.array(self.query).reshape(self.batch, -1)

    @property
    def attention_mask(self) -> np.ndarray:
        """1 for the query's tokens, 0 for what stands left of a shorter one, `[batch, tokens]`."""
        places = np.arange(len(self.query) // self.batch)[None]
        return (places >= self._padding[:, None]).astype(int)

    @property
    def position_ids(self) -> np.ndarray:
        """The query's positions, `[batch, tokens]`: a prompt's first token stands where its context ended.

        What stands left of a shorter prompt has position 0; nothing looks at it.
        """
        if self.positions:
            return np.array(self.positions).reshape(self.batch, -1)
        places = np.arange(len(self.query) // self.batch)[None] - self._padding[:, None]
        return np.where(places < 0, 0, places + self.context_length)

    @property
    def _padding(self) -> np.ndarray:
        return np.array(self.padding or [0] * self.batch)

    @property
    def validity(self) -> str:
        """For which tokens the patch is exact, in words."""
        served = {"last": "the last token", "each": "every token, each with its own patch", "all": "every token"}
        real = self.position_ids[self.attention_mask == 1]
        where = f"{len(self.query) // self.batch} token(s), at positions {real.min()} to {real.max()}"
        queries = f"one query of {where}" if self.batch == 1 else f"each of {self.batch} queries of up to {where}"
        exact = f"exact for {served[self.tokens]} of {queries}"
        if self.whole:
            return f"not exact: {len(self.changes)} of the {len(self.whole)} changes of a patch that was {exact}"
        return exact

    @property
    def fingerprinted(self) -> tuple[str, ...]:
        """The slots whose weights `made_for` tells: those that change, or changed in the patch this is a part of."""
        return self.whole or tuple(self.changes)

    def table(self) -> Table:
        """What changes, a row for each parameter: layer, shape, rank, norm, and how much rounding is amplified."""
        return table_of(self.changes, self.validity)

    def plot(self) -> Any:
        """Norm and rank of the changes over the layers, as a `matplotlib.figure.Figure`.

        Raises:
            MissingDependency: `matplotlib` is not installed.
        """
        return figure(self)

    def subset(self, layers: int | Iterable[int] | None = None, parameters: Globs = ()) -> Self:
        """The part of the patch that changes some layers or parameters only, as for an ablation.

        A part is not exact: nothing was measured for it, and `validity` says so. The model it fits is the same.

        Args:
            layers: numbers of layers (one alone will do), as `table` shows them; None for all.
            parameters: globs of slots, as `*.down_proj`; empty for all.

        Raises:
            BadInput: a layer that the patch does not change, a glob that matches nothing, or nothing is left.
        """
        patterns = globs("parameters", parameters)
        chosen = _chosen_layers(self.changes, layers)
        for pattern in patterns:
            if not any(fnmatchcase(slot, pattern) for slot in self.changes):
                raise BadInput(f"{pattern!r:.80} matches none of the changes; there are {listed(self.changes)}")
        kept = {
            slot: change
            for slot, change in self.changes.items()
            if (chosen is None or layer_of(slot) in chosen)
            and (not patterns or any(fnmatchcase(slot, p) for p in patterns))
        }
        if not kept:
            raise BadInput("no change is in those layers and matches those globs; there would be nothing to apply")
        if len(kept) == len(self.changes):
            return self
        return replace(
            self, changes=kept, measured={}, whole=self.fingerprinted, source="",
            transposed=tuple(slot for slot in self.transposed if slot in kept),
            tensors=None if self.tensors is None else {s: t for s, t in self.tensors.items() if s in kept},
        )  # fmt: skip

    @staticmethod
    def of(absorbed: Any, model: Model, dtype: str) -> Patch:
        """The patch of an `Absorbed` context, with the fingerprint of the model it was made for."""
        changes = {
            stored_name(model.architecture, layer, name): narrowed(change, dtype)
            for layer, overlay in absorbed.overlays.items()
            for name, change in overlay.items()
        }
        request = absorbed.request
        measured = asdict(absorbed.measured)
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
            transposed=tuple(slot for slot in changes if model.parts[slot].transposed),
            tensors=model.whole_weights(changes),
            merged=request.merge,
        )

    def save(self, path: str | Path) -> None:
        """Writes the patch; an existing file is replaced only when the new one is complete.

        Raises:
            BadInput: the file cannot be written.
        """
        facts = {
            "made_for": dict(self.made_for), "strategy": self.strategy, "tokens": self.tokens,
            "context_length": self.context_length, "query": list(self.query), "dtype": self.dtype,
            "measured": dict(self.measured),
        }  # fmt: skip
        more = {
            "batch": self.batch if self.batch > 1 else None, "padding": list(self.padding) or None,
            "positions": list(self.positions) or None, "transposed": list(self.transposed) or None,
            "tensors": None if self.tensors is None else dict(self.tensors), "merged": None if self.merged else False,
            "whole": list(self.whole) or None,
        }  # fmt: skip
        write_patch(Path(path), facts | {k: v for k, v in more.items() if v is not None}, self.validity, self.changes)

    @staticmethod
    def load(path: str | Path) -> Patch:
        """Reads a patch file.

        Raises:
            BadInput: no such file, not a patch, or of a format that this version does not know.
        """
        facts, changes = read_patch(Path(path))
        return Patch(changes, **facts, source=str(path))

    def apply(self, model: Any, merge: bool | None = None) -> Receipt:
        """Puts the patch on a model in memory (a `torch.nn.Module`, say), or leaves it wholly as it was.

        Args:
            merge: into the weights; False keeps the changes beside them, as factors; None does what the patch was
                measured for.

        Raises:
            BadInput: no framework's backend knows the model, the patch was made for another one or has no merged
                form, or a parameter cannot be changed; the message names it.
        """
        if merge:
            self.require_mergeable()
        each = self.tokens == "each" or any(change.per_token for change in self.changes.values())
        return backend_of(model).apply(self, model, self.merged and not each if merge is None else merge)

    def remove(self, model: Any) -> None:
        """Takes the patch off a model in memory: every byte of every parameter is as it was before `apply`.

        Raises:
            BadInput: the patch is not on the model, or another one lies above it.
        """
        backend_of(model).remove(self, model)

    @contextmanager
    def applied(self, model: Any, merge: bool | None = None) -> Iterator[Receipt]:
        """The model with the patch, for as long as the block runs, however it ends.

        Raises:
            BadInput: as for `apply`.
        """
        receipt = self.apply(model, merge)
        try:
            yield receipt
        except BaseException as error:
            try:
                self.remove(model)
            except BlockkitError as stuck:
                error.add_note(f"the patch is still on the model: {stuck}")
            raise
        self.remove(model)

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
            mine_shape, its_shape = shape_of(change), model.parameter(slot).shape
            if mine_shape != its_shape:
                raise BadInput(f"the patch's change of {slot} has the shape {mine_shape}, this model's is {its_shape}")
        if missing := [slot for slot in self.fingerprinted if slot not in model.parts]:
            raise BadInput(f"the patch was made for a model with {missing[0]}, which {model.folder.path} has not")
        found = model.fingerprint(list(self.fingerprinted))
        if found["weights"] != self.made_for.get("weights"):
            raise BadInput(
                f"the patch was made for other weights than those in {model.folder.path}: "
                "the hash of the weights that it changes differs"
            )

    def require_mergeable(self) -> None:
        """Refuses a patch that has no merged form.

        Raises:
            BadInput: it holds different values for every token or prompt.
        """
        if self.tokens == "each":
            raise BadInput("a patch of --tokens each holds different values for every token; it cannot be merged")
        if any(change.per_token for change in self.changes.values()):
            raise BadInput("the patch holds different values for every prompt of its batch; it cannot be merged")

    def merge_into(self, model: Model, out: Path) -> None:
        """Writes the model with the patch merged, as an ordinary Hugging Face checkpoint.

        Raises:
            BadInput: a wrong model, a patch that has no merged form, or a folder that cannot be written.
        """
        self.require_mergeable()
        self.check(model)
        merged = {slot: dense(model.parameter(slot), change) for slot, change in self.changes.items()}
        write_folder(model.folder, out, model.rewritten(merged))


def _chosen_layers(changes: Mapping[str, Change], layers: int | Iterable[int] | None) -> frozenset[int] | None:
    if layers is None:
        return None
    found = frozenset((layers,) if isinstance(layers, int) else layers if isinstance(layers, Iterable) else (layers,))
    known = sorted({n for n in map(layer_of, changes) if n is not None})
    if strange := [n for n in found if type(n) is not int or n not in known]:
        raise BadInput(f"layers holds {strange[0]!r:.40}; the patch changes {', '.join(map(str, known)) or 'no layer'}")
    return found
