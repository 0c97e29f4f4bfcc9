"""Patches: a context as changed parameters, and what is done with them.

A patch holds two factors for a matrix and a shift for a vector, never a dense change; beside them, which
weights it was made for, for which tokens it is exact, and what error was measured. `file.py` has its file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..absorbing.written import Promise, Proved, prove
from ..checkpoint.folder import write_folder
from ..checkpoint.model import Model, open_model, stored_name
from ..display import figure, tagged
from ..errors import BadInput, BlockkitError
from ..graph.changes import Change, dense, narrowed, shape_of
from ..graph.graph import Globs
from .file import changes_digest, read_patch, write_patch
from .in_place import Receipt, backend_of
from .table import Table, selected, table_of

ALLOWED = "--allow-other-weights (allow_other_weights=True) uses it there all the same, and claims nothing"


@dataclass(frozen=True, eq=False)
class Patch:
    """Changed parameters of one model, exact for named tokens.

    A model in memory is edited by `apply` and restored by `remove`, or inside `with patch.applied(model):`; a model
    saved there (`model.save_pretrained(folder)`) is an ordinary checkpoint with the patch merged.

    Attributes:
        changes: by slot; float32 (float64 for a model in float64), in the orientation y = W z. A slot is a parameter
            of the kit's own models (`layers.3.mlp.down_proj`), or the name that a model in memory has for it
            (`NAME[e]`: for the slice `e` along its first axis, as of one expert).
        made_for: fingerprint of the model, as the program that ran it holds it: its `architecture`, and the `digest`
            over all that `covers` says. (Files of format 1: `weights`, a hash of the weights that change.)
        strategy: how the parameters were chosen.
        tokens: `last`, `each` or `all`.
        context_length: positions before the query, which runs from here on (of several prompts: the most).
        query: the token ids for which the patch is exact, in this order: `batch` prompts of one length; all -1 where
            the query was embeddings.
        dtype: in which the model ran when the patch was made.
        measured: error of the edited model's ordinary run (`linf`, `tvd`, `top1_agree`).
        batch: how many prompts the query is. A per-token change then has a row for each token, or for each prompt.
        padding: how many tokens on the left of each prompt are no tokens; empty where there are none.
        positions: the query's positions, as `query` is, once or several times (see `position_ids`); empty where all
            follow `context_length` others.
        transposed: slots whose stored tensor is `[d_in, d_out]`.
        tensors: for a patch of the kit's own models, the weights of the checkpoint that are a slot and nothing
            else; None where the slots are the model's own names.
        merged: whether it was solved, and measured, for changes rounded into the weights; if not, for changes kept
            beside them as factors.
        measured_for: digest of the changes that `measured` is about: all of them, unless some were taken out since.
        contextual, floors: what an edited checkpoint is to give; see `blockkit.absorbing.written.Promise`.
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
    measured_for: str = ""
    contextual: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    floors: Mapping[str, float] = field(default_factory=dict)
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.measured_for:
            object.__setattr__(self, "measured_for", self._changes_digest)

    def __repr__(self) -> str:
        error = f", linf {self.measured['linf']:.2g}" if "linf" in self.measured else ""
        return tagged(self, f"{len(self.changes)} changed parameter(s), {self.strategy}; {self.validity}{error}")

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    @cached_property
    def _changes_digest(self) -> str:
        return changes_digest(self.changes)

    @property
    def whole(self) -> bool:
        """Whether it holds just the changes that were measured together."""
        return self.measured_for == self._changes_digest

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

        `[k, batch, tokens]` for a model that gives each token several (image, row, column). What stands left of a
        shorter prompt has position 0; nothing looks at it.
        """
        return self._places

    @property
    def _places(self) -> np.ndarray:
        if self.positions:
            several = len(self.positions) // len(self.query)
            shape = (self.batch, -1) if several == 1 else (several, self.batch, -1)
            return np.array(self.positions).reshape(shape)
        places = np.arange(len(self.query) // self.batch)[None] - self._padding[:, None]
        return np.where(places < 0, 0, places + self.context_length)

    @property
    def _padding(self) -> np.ndarray:
        return np.array(self.padding or [0] * self.batch)

    @property
    def validity(self) -> str:
        """For which tokens the patch is exact, in words; or that nothing is proved of what is left of it."""
        return self._claim if self.whole else f"not proved: other changes were measured, as {self._claim}"

    def validity_on(self, same_weights: bool) -> str:
        """What is claimed of the patch on a model: nothing where it was not made for the model's weights."""
        return (
            self.validity if same_weights else f"not proved on these weights; on those it was made for, {self._claim}"
        )

    @property
    def _claim(self) -> str:
        served = {"last": "the last token", "each": "every token, each with its own patch", "all": "every token"}
        real = self._places[..., self.attention_mask == 1]
        where = f"{len(self.query) // self.batch} token(s), at positions {real.min()} to {real.max()}"
        queries = f"one query of {where}" if self.batch == 1 else f"each of {self.batch} queries of up to {where}"
        return f"exact for {served[self.tokens]} of {queries}"

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

        Nothing was measured for a part, and `validity` claims nothing of it. The model it fits is the same.

        Args:
            layers: numbers of layers (one alone will do), as `table` shows them; None for all.
            parameters: globs of slots, as `*.down_proj`; empty for all.

        Raises:
            BadInput: a layer that the patch does not change, a glob that matches nothing, or nothing is left.
        """
        kept = selected(self.changes, layers, parameters)
        if len(kept) == len(self.changes):
            return self
        return replace(
            self, changes=kept, measured={}, measured_for=self.measured_for, contextual={}, floors={}, source="",
            transposed=tuple(slot for slot in self.transposed if slot in kept),
            tensors=None if self.tensors is None else {s: t for s, t in self.tensors.items() if s in kept},
        )  # fmt: skip

    @staticmethod
    def of(absorbed: Any, model: Model, dtype: str, promise: Promise | None = None) -> Patch:
        """The patch of an `Absorbed` context, with the fingerprint of the model it was made for.

        Args:
            promise: what an edited checkpoint is to give; by default the contextual run in `dtype` alone.
        """
        changes = {
            stored_name(model.architecture, layer, name): narrowed(change, dtype)
            for layer, overlay in absorbed.overlays.items()
            for name, change in overlay.items()
        }
        request = absorbed.request
        measured = asdict(absorbed.measured)
        strategies = {p.strategy for p in absorbed.plans.values()}
        kept = promise or Promise({dtype: absorbed.stream.astype(np.float32)}, {})
        return Patch(
            changes,
            model.fingerprint(),
            ", ".join(sorted(strategies)),
            request.tokens,
            len(request.context),
            tuple(int(i) for i in request.query),
            dtype,
            measured,
            transposed=tuple(slot for slot in changes if model.parts[slot].transposed),
            tensors=model.whole_weights(changes),
            merged=request.merge,
            contextual=kept.contextual if request.merge else {},
            floors=kept.floors,
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
            "measured_for": self.measured_for, "floors": dict(self.floors) or None,
        }  # fmt: skip
        facts |= {k: v for k, v in more.items() if v is not None}
        write_patch(Path(path), facts, self.validity, self.changes, self.contextual)

    @staticmethod
    def load(path: str | Path) -> Patch:
        """Reads a patch file.

        Raises:
            BadInput: no such file, not a patch, or of a format that this version does not know.
        """
        facts, changes = read_patch(Path(path))
        return Patch(changes, **facts, source=str(path))

    def apply(self, model: Any, merge: bool | None = None, allow_other_weights: bool = False) -> Receipt:
        """Puts the patch on a model in memory (a `torch.nn.Module`, say), or leaves it wholly as it was.

        Args:
            merge: into the weights; False keeps the changes beside them, as factors; None does what the patch was
                measured for.
            allow_other_weights: put it on a model with other values too; nothing is then claimed of the result.

        Raises:
            BadInput: no framework's backend knows the model, the patch was made for another one or has no merged
                form, or a parameter cannot be changed; the message names it.
        """
        if merge:
            self.require_mergeable()
        each = self.tokens == "each" or any(change.per_token for change in self.changes.values())
        merging = self.merged and not each if merge is None else merge
        more = (True,) if allow_other_weights else ()  # a backend that does not have it need not know of it
        return backend_of(model).apply(self, model, merging, *more)

    def remove(self, model: Any) -> None:
        """Takes the patch off a model in memory: every byte of every parameter is as it was before `apply`.

        Raises:
            BadInput: the patch is not on the model, or another one lies above it.
        """
        backend_of(model).remove(self, model)

    @contextmanager
    def applied(self, model: Any, merge: bool | None = None, allow_other_weights: bool = False) -> Iterator[Receipt]:
        """The model with the patch, for as long as the block runs, however it ends.

        Raises:
            BadInput: as for `apply`.
        """
        receipt = self.apply(model, merge, allow_other_weights)
        try:
            yield receipt
        except BaseException as error:
            try:
                self.remove(model)
            except BlockkitError as stuck:
                error.add_note(f"the patch is still on the model: {stuck}")
            raise
        self.remove(model)

    def check(self, model: Model, allow_other_weights: bool = False) -> bool:
        """Refuses a model for which the patch was not made; gives whether its weights are those it was made for.

        Raises:
            BadInput: the architecture or a shape differs, or the weights and that is not allowed; the message names it.
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
        if "digest" in self.made_for:
            same, what = model.fingerprint() == self.made_for, "all of the model's weights"
        else:
            same = model.digest_of(self.changes) == self.made_for.get("weights")
            what = "the weights that it changes"
        if not same and not allow_other_weights:
            raise BadInput(
                f"the patch was made for other weights than those in {model.folder.path}: the digest of {what} "
                f"differs. {ALLOWED}"
            )
        return same

    def same_as(self, other: Patch) -> bool:
        """Whether two patches are one, perhaps saved and loaded in between."""
        if self is other:
            return True
        mine, its = ((dict(p.made_for), p.query, p._changes_digest) for p in (self, other))
        return mine == its

    def require_mergeable(self) -> None:
        """Refuses a patch that has no merged form.

        Raises:
            BadInput: it holds different values for every token or prompt.
        """
        if self.tokens == "each":
            raise BadInput("a patch of --tokens each holds different values for every token; it cannot be merged")
        if any(change.per_token for change in self.changes.values()):
            raise BadInput("the patch holds different values for every prompt of its batch; it cannot be merged")

    def merge_into(self, model: Model, out: Path, allow_other_weights: bool = False) -> Merged:
        """Writes the model with the patch merged, as an ordinary Hugging Face checkpoint, and runs what was written.

        Args:
            allow_other_weights: write it also into a model with other values; nothing is then proved or claimed.

        Raises:
            BadInput: a wrong model, a patch that has no merged form, or a folder that cannot be written.
            ExactnessLost: the written files do not give the contextual logits; the folder does not appear.
        """
        self.require_mergeable()
        if self.tensors is None:
            raise BadInput(
                "the patch was made on a model in memory, whose own names it has; put it on that model and save it: "
                "patch.apply(model, merge=True); model.save_pretrained(folder)"
            )
        same = self.check(model, allow_other_weights)
        merged = {slot: dense(model.parameter(slot), change) for slot, change in self.changes.items()}
        proofs: list[Proved] = []

        def approve(written: Path) -> None:
            promise = Promise(self.contextual, self.floors)
            proofs.append(prove(open_model(written), promise, self.query_ids[0], self.position_ids[0], self.dtype))

        provable = same and self.whole and bool(self.contextual)
        write_folder(model.folder, out, model.rewritten(merged), approve if provable else None)
        if provable:
            off = f"within {max(proofs[0].linf.values()):.2g} of the contextual logits for"
            return Merged(self.validity if proofs[0].exact else self.validity.replace("exact for", off, 1), proofs[0])
        if same and self.whole:
            return Merged(f"not proved in this form: the patch file has nothing to compare with; made as {self._claim}")
        return Merged(self.validity_on(same))


@dataclass(frozen=True)
class Merged:
    """A checkpoint that was written with a patch in it.

    Attributes:
        validity: for which tokens it is exact, in words.
        proved: the run of the written files; None where nothing is proved of them.
    """

    validity: str
    proved: Proved | None = None
