"""An exported LoRA, loaded by `peft` onto the model it was made for, and run on the patch's query.

The model itself is never touched: everything is put on a copy of its modules that shares all its tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from blockkit.errors import BadInput, ExactnessLost, NotPatchable, blamed
from blockkit.extras import require
from blockkit.graph.changes import MatrixChange
from blockkit.patch.in_place import backend_of
from blockkit.patch.patch import Patch
from blockkit.patch.peft import Rerun, base_name

from ..calling.interface import PATTERN, Interface, device_of, logits_of, vocabulary
from ..calling.loading import load_model
from ..calling.token_rows import close


def reloaded(patch: Patch, changes: Mapping[str, MatrixChange], base: Any, adapter: Path) -> Rerun:
    """Runs the model without the patch, with its changes in the weights, and with the adapter.

    Args:
        changes: by the path of the module that has the weight.
        base: a `torch.nn.Module`, or the folder of a Hugging Face causal language model.
        adapter: the folder of the adapter.

    Raises:
        BadInput: the folder cannot be loaded, or the patch was not made for this model.
        NotPatchable: `peft` cannot put the adapter on this model.
        ExactnessLost: `peft` left some of the adapter's tensors out.
    """
    model = load_model(base, patch.dtype) if isinstance(base, Path) else base
    if patch.tensors is None:
        backend_of(model).check(patch, model)
    transposed = _transposed(patch)
    for path, change in changes.items():
        _require_module(model, path, change, path in transposed)
    causal, name = causal_head(model), str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared).eval()
    unpatched = _logits(twin, patch)
    with _merged(twin, changes, transposed):
        patched = _logits(twin, patch)
    with _kept_trainable(model):
        again = _logits(_with_adapter(twin, adapter), patch)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return Rerun(unpatched, patched, again, torch.finfo(dtype).eps, causal, name)


def causal_head(model: torch.nn.Module) -> bool:
    """Whether the model gives a logit for every id, and those of a token do not depend on later ones."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    count = vocabulary(model)
    if head is None or count is None or not hasattr(model, "generate"):
        return False
    ids = torch.tensor([PATTERN], device=device_of(model))
    other = ids.clone()
    other[0, -1] = 1 - other[0, -1]
    with torch.no_grad():
        try:
            one, two = (logits_of(model(input_ids=value)) for value in (ids, other))
        except Exception:  # it takes more than ids
            return False
    return one.shape[-1] >= count and close(two[:, :-1].float(), one[:, :-1].float())


def _module(model: torch.nn.Module, path: str) -> Any:
    """The module of the base model's path, within PEFT's wrappers too."""
    modules = dict(model.named_modules())
    found = modules.get(path, modules.get(f"base_model.model.{path}"))
    return getattr(found, "base_layer", found)


def _transposed(patch: Patch) -> set[str]:
    """The paths of the modules whose weights are stored `[d_in, d_out]`."""
    names = patch.transposed if patch.tensors is None else [patch.tensors.get(s, "") for s in patch.transposed]
    return {base_name(name).removesuffix(".weight") for name in names}


def _require_module(model: torch.nn.Module, path: str, change: MatrixChange, transposed: bool) -> None:
    weight = getattr(_module(model, path), "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise BadInput(f"the model has no module {path} with a weight, which the patch changes")
    wanted = (change.left.shape[1], change.right.shape[1])
    wanted = wanted[::-1] if transposed else wanted
    if tuple(weight.shape) != wanted:
        raise BadInput(f"the patch's change of {path} has the shape {wanted}, the model's is {tuple(weight.shape)}")


def _logits(model: torch.nn.Module, patch: Patch) -> np.ndarray:
    """Logits `[batch, tokens, vocabulary]` on the patch's query at its positions, as far as the model takes them."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    asked = {"position_ids": patch.position_ids, "use_cache": False}
    if patch.padding:
        asked["attention_mask"] = patch.attention_mask
    takes = Interface.of(model).takes
    given = {k: torch.as_tensor(v, device=device) if k != "use_cache" else v for k, v in asked.items() if k in takes}
    if (patch.query_ids < 0).any() or "decoder_input_ids" in takes:
        what = "the model is an encoder-decoder one" if "decoder_input_ids" in takes else "its query was embeddings"
        raise BadInput(f"no run can prove an adapter of this patch: {what}. Export it without the model")
    try:
        with torch.no_grad():
            found = model(torch.as_tensor(patch.query_ids, device=device), **given)
    except Exception as error:
        raise BadInput(f"{type(model).__name__} does not run on the patch's query: {blamed(error)}") from error
    return np.asarray(getattr(found, "logits", found).to(torch.float64).cpu())


@contextmanager
def _merged(model: torch.nn.Module, changes: Mapping[str, MatrixChange], transposed: set[str]) -> Iterator[None]:
    """The model with the changes in its weights, W + left^T right: whatever reads them, sees them."""
    modules = {path: _module(model, path) for path in changes}
    before = {path: module.weight for path, module in modules.items()}
    try:
        for path, change in changes.items():
            weight = before[path].detach()
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            left, right = (
                torch.as_tensor(f, dtype=wide.dtype, device=wide.device) for f in (change.left, change.right)
            )
            moved = wide + (right.T @ left if path in transposed else left.T @ right)
            modules[path].weight = torch.nn.Parameter(moved.to(weight.dtype), requires_grad=False)
        yield
    finally:
        for path, module in modules.items():
            module.weight = before[path]


@contextmanager
def _kept_trainable(model: torch.nn.Module) -> Iterator[None]:
    """`peft` freezes the parameters that it finds, which the copy shares with the model."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)


def _with_adapter(model: torch.nn.Module, adapter: Path) -> Any:
    """The model with the adapter loaded by `peft`, and every tensor of the adapter's file found in it."""
    peft, name = require("peft"), "default"
    try:
        if isinstance(model, peft.PeftModel):  # beside the adapters that it has
            loaded, name, active = model, "blockkit", list(model.active_adapters)
            loaded.load_adapter(str(adapter), name)
            loaded.base_model.set_adapter([*active, name])
        else:
            loaded = peft.PeftModel.from_pretrained(model, str(adapter))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise NotPatchable(f"peft does not put the adapter on this model: {error}") from None
    there = {key.replace(f".{name}.", "."): p for key, p in loaded.named_parameters() if f".{name}." in key}
    for key, meant in load_file(adapter / "adapter_model.safetensors").items():
        if key not in there or not torch.equal(there[key].detach().cpu().to(meant.dtype), meant):
            raise ExactnessLost(f"peft does not find the adapter's {key} on this model; nothing was written")
    return loaded
