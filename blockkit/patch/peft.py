"""A patch as an adapter file that other programs load: a LoRA for PEFT, straight from the factors.

A LoRA adds B (A z) to a module's result, with A `[rank, d_in]` and B `[d_out, rank]`: what a patch of matrices
alone holds already. What it cannot carry is refused. With the model at hand the adapter is loaded by `peft`
and run before it appears; how, its entry point of the group `blockkit.adapters` knows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np

from ..absorbing.metrics import compare
from ..atomic import new_folder
from ..errors import BadInput, ExactnessLost, MissingDependency, NotPatchable
from ..extras import reason
from ..graph.changes import Change, MatrixChange
from ..progress import Progress
from .file import in_order
from .patch import Patch

GROUP = "blockkit.adapters"
FORMATS = ("peft",)
MOST = 0.1  # of what the patch does, however coarse the rounding
TOLERANCE = 1e-3  # how far off the reloaded adapter may be, of what the patch does to the logits


@dataclass(frozen=True)
class Rerun:
    """Logits `[batch, tokens, vocabulary]` of a model on the patch's query, and the rounding unit of its dtype.

    Attributes:
        causal: whether the model is a causal language model with a head, as a run of it shows.
        name: what its configuration calls it; empty where that says nothing.
    """

    unpatched: np.ndarray
    patched: np.ndarray
    reloaded: np.ndarray
    rounding: float
    causal: bool = False
    name: str = ""


@dataclass(frozen=True)
class Adapter:
    """An adapter that was written.

    Attributes:
        folder: where.
        ranks: by the path of the module that it adds to.
        transposed: whether modules store their weights `[d_in, d_out]` (`fan_in_fan_out`).
        measured: largest difference of a logit between the model with the adapter, loaded by `peft`, and the
            patched model (`reloaded_linf`), and between the unpatched model and the patched one
            (`unpatched_linf`); the largest logit, and how often the most probable token is the same
            (`top1_agree`). None where no model was given to compare with.
    """

    folder: Path
    ranks: Mapping[str, int]
    transposed: bool
    measured: Mapping[str, float] | None


def export_peft(patch: Patch, out: str | Path, model: Any = None, progress: Progress | None = None) -> Adapter:
    """Writes the patch as a PEFT LoRA; the folder appears complete or not at all.

    Args:
        out: a folder that does not exist, or is empty.
        model: to compare with: the path of a Hugging Face checkpoint (or what else `--model` takes), or the
            `torch.nn.Module` that the patch was made for, without the patch; it is left as it is.
        progress: called with a stage and the fraction of it that is done, while a model is opened.

    Raises:
        NotPatchable: the patch holds what a LoRA cannot; the message names it.
        BadInput: the folder cannot be written, or the patch was not made for this model.
        MissingDependency: comparing needs a package that is not installed.
        ExactnessLost: the adapter, loaded by `peft`, does not do what the patch does.
    """
    changes = module_changes(patch)
    base = _base(patch, model, progress)
    with new_folder(Path(out)) as partial:
        _write_config(partial, patch, changes, None)
        (partial / "adapter_model.safetensors").write_bytes(_weights(patch, changes))
        rerun = None if base is None else _reloader()(patch, changes, base, partial)
        measured = None if rerun is None else _measured(rerun, patch)
        _write_config(partial, patch, changes, rerun)
        (partial / "README.md").write_text(_card(patch, rerun))
    ranks = {path: len(change.left) for path, change in changes.items()}
    return Adapter(Path(out), ranks, bool(patch.transposed), measured)


def module_changes(patch: Patch) -> dict[str, MatrixChange]:
    """The patch's changes by the path of the module that has the weight.

    Raises:
        NotPatchable: one of them is none that a LoRA can carry.
    """
    found = {}
    for slot, change in patch.changes.items():
        if not isinstance(change, MatrixChange):
            raise NotPatchable(
                f"a LoRA changes matrices alone, and this patch changes the vector {slot}; "
                'make one with strategy="matrix" (--strategy matrix)'
            )
        found[_module(patch, slot, change)] = change
    if not any(len(change.left) for change in found.values()):
        raise NotPatchable("the patch changes nothing, and a LoRA of rank 0 cannot be written")
    return {path: change for path, change in found.items() if len(change.left)}


def _module(patch: Patch, slot: str, change: Change) -> str:
    """The path of the module whose `.weight` the slot is."""
    if change.per_token:
        raise NotPatchable(
            f"the patch of {slot} has its own values for every token, and a LoRA has one for all; "
            "make one with tokens='last' or 'all', of one prompt"
        )
    name = slot if patch.tensors is None else patch.tensors.get(slot, "")
    path, _, last = base_name(name).rpartition(".")
    if (adapter := ADAPTER.search(name)) is not None:
        raise NotPatchable(
            f"{slot} is part of an adapter ({adapter[1]}) that lies on the model, and a LoRA changes the model's own "
            "weights; absorb with freeze=['*lora_*'], or merge the adapter first (merge_and_unload)"
        )
    if last == "weight" and path:
        return path
    if slot.endswith("]"):
        raise NotPatchable(f"{slot} is one slice of a stacked parameter, and a LoRA changes a module's whole weight")
    if patch.tensors is None:
        raise NotPatchable(f"{slot} is no module's .weight, and a LoRA changes nothing else")
    raise NotPatchable(f"{slot} is not the whole of one weight in its checkpoint, and a LoRA changes a whole weight")


ADAPTER = re.compile(r"\.(lora_\w+|ia3_\w+|modules_to_save)\.")


def base_name(name: str) -> str:
    """The name that a parameter of a model within PEFT's wrappers has in the model itself."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _base(patch: Patch, model: Any, progress: Progress | None) -> Any:
    """What to compare with: a folder or a model, found to be the patch's own as far as the core can tell."""
    if model is None:
        return None
    if not isinstance(model, str | Path):
        if patch.tensors is not None:
            raise BadInput("the patch was made for a checkpoint; give that checkpoint's path, not a model in memory")
        return model
    from ..checkpoint.cache import resolve_model
    from ..checkpoint.model import open_checkpoint

    if patch.tensors is None:
        return resolve_model(str(model), progress)
    opened = open_checkpoint(str(model), progress)
    patch.check(opened)
    return opened.folder.path


def _write_config(folder: Path, patch: Patch, changes: Mapping[str, MatrixChange], run: Rerun | None) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(_config(patch, changes, run), indent=2) + "\n")


def public_name(name: str) -> str | None:
    """The name of a model that others can load, as an index has it; None for a path, and for what may be one."""
    return name if PUBLIC.fullmatch(name) and not Path(name).exists() else None


PUBLIC = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def _card(patch: Patch, run: Rerun | None) -> str:
    """The adapter's `README.md`."""
    base = None if run is None else public_name(run.name)
    above = any(base_name(slot) != slot for slot in patch.changes)
    lines = [
        "# A context as a LoRA",
        f"Made by blockkit: {patch.validity}. Run the model with it on the query alone, with the `position_ids` in "
        "the header of `adapter_model.safetensors`.",
    ]
    if base is None:
        why = "no model was given when it was written" if run is None else "the model has no public name"
        lines.append(
            f"`base_model_name_or_path` is null: {why}. Load the model yourself, then "
            "`PeftModel.from_pretrained(model, folder)`."
        )
    if above:
        lines.append("The model had adapters on it when the patch was made: put them on it beside this one.")
    return "\n\n".join(lines) + "\n"


def _config(patch: Patch, changes: Mapping[str, MatrixChange], run: Rerun | None) -> dict[str, Any]:
    """The content of `adapter_config.json`; the scale alpha / r of every module is 1."""
    ranks = {path: len(change.left) for path, change in changes.items()}
    most = max(ranks.values())
    other = {"^" + re.escape(path): rank for path, rank in ranks.items() if rank != most}  # `peft` reads patterns
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if run is not None and run.causal else None,
        "base_model_name_or_path": None if run is None else public_name(run.name),
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": list(changes),
        "fan_in_fan_out": bool(patch.transposed),
        "bias": "none",
        "lora_dropout": 0.0,
    }


def _weights(patch: Patch, changes: Mapping[str, MatrixChange]) -> bytes:
    from safetensors.numpy import save

    tensors = {}
    for path, change in changes.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = np.ascontiguousarray(change.right, np.float32)
        tensors[f"base_model.model.{path}.lora_B.weight"] = np.ascontiguousarray(change.left.T, np.float32)
    positions = json.dumps(patch.position_ids.tolist())
    return in_order(save(tensors, {"format": "pt", "validity": patch.validity, "position_ids": positions}))


def _reloader() -> Any:
    """What loads an adapter onto a model: `(patch, changes by module path, model or folder, adapter) -> Rerun`."""
    found = [entry for entry in entry_points(group=GROUP) if entry.name == "peft"]
    try:
        return found[0].load()
    except (IndexError, ImportError) as error:
        raise MissingDependency(
            f"comparing the adapter with the model needs peft and PyTorch ({reason(error)}). "
            'Install them with: pip install "blockkit-patch[peft]"'
        ) from None


def _measured(run: Rerun, patch: Patch) -> dict[str, float]:
    """How far the reloaded adapter is from the patch, on the query's tokens.

    Raises:
        ExactnessLost: too far.
    """
    real = patch.attention_mask == 1
    unpatched, patched, reloaded = (np.asarray(v, np.float64)[real] for v in (run.unpatched, run.patched, run.reloaded))
    off, effect, largest = compare(reloaded, patched), compare(unpatched, patched).linf, float(np.abs(patched).max())
    rounding = min(10 * run.rounding * largest, MOST * effect)  # what does nothing is not a matter of rounding
    if not off.linf <= max(TOLERANCE * effect, rounding):
        raise ExactnessLost(
            f"the adapter, loaded by peft, is off by {off.linf:.3g} in the logits, where the patch changes them by "
            f"{effect:.3g}; nothing was written"
        )
    return {
        "reloaded_linf": off.linf,
        "unpatched_linf": effect,
        "largest_logit": largest,
        "top1_agree": off.top1_agree,
    }
