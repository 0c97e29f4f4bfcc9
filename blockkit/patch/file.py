"""The file of a patch: safetensors with the factors, and the facts about them in its header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..absorbing.lockstep import EPS
from ..absorbing.request import MODES
from ..atomic import write_file
from ..errors import BadInput
from ..graph.changes import Change, MatrixChange, VectorChange

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
MORE_FACTS = {  # may be absent
    "batch": int, "padding": list, "positions": list, "transposed": list, "tensors": dict, "merged": bool,
    "whole": list,
}  # fmt: skip


def write_patch(path: Path, facts: Mapping[str, Any], validity: str, changes: Mapping[str, Change]) -> None:
    """Writes a patch; an existing file is replaced only when the new one is complete.

    Args:
        facts: the patch's fields but its changes, as JSON has them; those of `MORE_FACTS` may be left out.

    Raises:
        BadInput: the file cannot be written.
    """
    from safetensors.numpy import save

    tensors = _tensors(changes)
    header = {
        "format": f"blockkit-patch {FORMAT}", "validity": validity, "patch": json.dumps(facts),
        "sha256": _digest(tensors),
    }  # fmt: skip
    write_file(path, save(tensors, header))


def read_patch(source: Path) -> tuple[dict[str, Any], dict[str, Change]]:
    """The facts and the changes of a patch file.

    Raises:
        BadInput: no such file, not a patch, damaged, or of a format that this version does not know.
    """
    from safetensors import SafetensorError, safe_open

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
        if "sha256" in header and header["sha256"] != _digest(tensors):  # older files have none
            raise ValueError("the numbers are not those that were written")
        facts = _facts(header["patch"])
        changes = _changes(tensors, facts["tokens"] == "each")
        _require_fitting(facts, changes)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{source}: its header or tensors are damaged ({error})") from None
    return facts, changes


# -- facts -------------------------------------------------------------------------------------------


def _facts(text: str) -> dict[str, Any]:
    """What the header says of a patch.

    Raises:
        KeyError, TypeError, ValueError: it is damaged.
    """
    facts = json.loads(text)
    allowed = FACTS | MORE_FACTS
    for name, value in facts.items():
        if name not in allowed or type(value) is not allowed[name]:
            raise ValueError(f"{name} is {value!r:.40}")
    if missing := FACTS.keys() - facts.keys():
        raise ValueError(f"without {', '.join(sorted(missing))}")
    if facts["dtype"] not in EPS:
        raise ValueError(f"dtype is {facts['dtype']!r:.40}")
    if facts["tokens"] not in MODES or facts["context_length"] < 1 or not facts["query"]:
        raise ValueError("tokens, context_length or query is out of range")
    if not all(type(v) is str for v in (*_names(facts), *facts.get("tensors", {}).values())):
        raise ValueError("transposed, whole or tensors holds what is no name")
    whole = {k: _integers(k, facts[k]) for k in ("query", "padding", "positions") if k in facts}
    _require_batch(whole, facts.get("batch", 1))
    names = {key: tuple(facts[key]) for key in ("transposed", "whole") if key in facts}
    return {**facts, **whole, **names}


def _names(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*facts.get("transposed", ()), *facts.get("whole", ()))


def _integers(name: str, values: list[Any]) -> tuple[int, ...]:
    least = -1 if name == "query" and set(values) == {-1} else 0  # embeddings have no ids
    if not all(type(v) is int and least <= v < 2**31 for v in values):
        raise ValueError(f"{name} holds {values!r:.40}")
    return tuple(values)


def _require_batch(facts: Mapping[str, tuple[int, ...]], batch: int) -> None:
    """Refuses prompts that are not all of one length, or more padding than a prompt has room for."""
    tokens, padding, positions = len(facts["query"]), facts.get("padding", ()), facts.get("positions", ())
    if batch < 1 or tokens % batch:
        raise ValueError(f"batch is {batch}, and the query has {tokens} tokens")
    if padding and (len(padding) != batch or max(padding) >= tokens // batch):
        raise ValueError(f"padding is {padding!r:.40}")
    if positions and len(positions) != tokens:
        raise ValueError(f"{len(positions)} positions for {tokens} tokens")


def _require_fitting(facts: Mapping[str, Any], changes: Mapping[str, Change]) -> None:
    """Refuses changes that are not those of a patch with these facts."""
    tokens, batch, each = len(facts["query"]), facts.get("batch", 1), facts["tokens"] == "each"
    for slot, change in changes.items():
        if change.per_token:
            rows = len(change.left if isinstance(change, MatrixChange) else change.delta)
            if rows != tokens and (batch == 1 or rows != batch):
                raise ValueError(f"the change of {slot} has {rows} rows for {tokens} tokens of {batch} prompts")
        if change.per_token != each and not (change.per_token and batch > 1):
            raise ValueError(f"the change of {slot} is not what a patch of its kind holds")
    if unknown := [s for s in (*facts.get("transposed", ()), *facts.get("tensors", {})) if s not in changes]:
        raise ValueError(f"{unknown[0]} does not change")
    if "whole" in facts and not changes.keys() < set(facts["whole"]):
        raise ValueError("it changes what the patch that it is a part of does not")


# -- changes -----------------------------------------------------------------------------------------


PER_TOKEN = "@each"  # behind a slot whose change has a row for every token


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.shape} {value.dtype}\n".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


def _tensors(changes: Mapping[str, Change]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for slot, change in changes.items():
        each = PER_TOKEN if change.per_token else ""
        if isinstance(change, MatrixChange):
            found[f"{slot}{each}.left"], found[f"{slot}{each}.right"] = change.left, change.right
        else:
            found[f"{slot}{each}.delta"] = change.delta
    return found


def _changes(tensors: Mapping[str, np.ndarray], each: bool) -> dict[str, Change]:
    """The changes that the tensors of a file hold.

    Args:
        each: the patch is one for each token; files once had `.each` behind its slots.

    Raises:
        KeyError, ValueError: a tensor is missing, or is none that a patch holds.
    """
    found: dict[str, Change] = {}
    for key, value in tensors.items():
        stem, part = key.rsplit(".", 1)
        ending = next((e for e in (PER_TOKEN, *((".each",) if each else ())) if stem.endswith(e)), "")
        slot, per_token = stem.removesuffix(ending), bool(ending)
        if value.dtype not in (np.float32, np.float64) or not np.isfinite(value).all() or not value.ndim:
            raise ValueError(f"the tensor {key} does not hold what a patch does")
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
