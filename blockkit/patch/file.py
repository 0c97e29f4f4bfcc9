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
from ..checkpoint.safetensors_file import read_header
from ..errors import BadInput
from ..graph.changes import Change, MatrixChange, VectorChange
from ..json_reader import parse_json

FORMAT = "2"
READ = ("1", FORMAT)  # format 1 had a digest of the tensors alone, or none
CONTEXTUAL = "@contextual."  # before the dtype of a contextual run, whose stream the tensor is
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
    "measured_for": str, "floors": dict,
}  # fmt: skip


def write_patch(
    path: Path,
    facts: Mapping[str, Any],
    validity: str,
    changes: Mapping[str, Change],
    contextual: Mapping[str, np.ndarray],
) -> None:
    """Writes a patch, the same bytes for the same patch; an existing file is replaced when the new one is complete.

    Args:
        facts: the patch's fields but its arrays, as JSON has them; those of `MORE_FACTS` may be left out.
        contextual: `[served, d_model]` by dtype, see `blockkit.absorbing.written.Promise`.

    Raises:
        BadInput: the file cannot be written.
    """
    from safetensors.numpy import save

    tensors = _tensors(changes) | {CONTEXTUAL + k: np.ascontiguousarray(v) for k, v in contextual.items()}
    header = {"format": f"blockkit-patch {FORMAT}", "validity": validity, "patch": json.dumps(facts, sort_keys=True)}
    write_file(path, in_order(save(tensors, header | {"sha256": digest(header, tensors)})))


def read_patch(source: Path) -> tuple[dict[str, Any], dict[str, Change]]:
    """The facts (with the contextual streams) and the changes of a patch file.

    Raises:
        BadInput: no such file, not a patch, damaged, or of a format that this version does not know.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if not source.is_file():
            raise BadInput(f"no patch file at {source}")
        _require_bounded(source)
        with safe_open(source, framework="np") as file:
            header = file.metadata() or {}
            written = next((f for f in READ if header.get("format") == f"blockkit-patch {f}"), None)
            tensors = {key: file.get_tensor(key) for key in file.keys()} if written else {}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError) as error:
        raise BadInput(f"{source} is not a readable safetensors file: {error}") from None
    if written is None:
        found = header.get("format", "no format at all")
        raise BadInput(f"{source} is not a patch of format {' or '.join(READ)} (its header says {found})")
    try:
        _require_undamaged(header, tensors, written)
        contextual = {k.removeprefix(CONTEXTUAL): v for k, v in tensors.items() if k.startswith(CONTEXTUAL)}
        facts = _facts(header["patch"])
        changes = _changes(
            {k: v for k, v in tensors.items() if not k.startswith(CONTEXTUAL)}, facts["tokens"] == "each"
        )
        _require_fitting(facts, changes)
        _require_streams(facts, contextual)
    except (BadInput, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{source}: its header or tensors are damaged ({error})") from None
    return facts | {"contextual": contextual}, changes


def digest(header: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over everything that a patch file says, header and tensors, in the order of their names."""
    found = hashlib.sha256()
    for name, text in sorted(header.items()):
        if name != "sha256":
            found.update(f"{len(name)} {len(text)} {name} {text}\n".encode())
    found.update(_numbers_digest(tensors).encode())
    return found.hexdigest()


def changes_digest(changes: Mapping[str, Change]) -> str:
    """SHA-256 over changes, by slot: what was measured together."""
    return _numbers_digest(_tensors(changes))


def _require_undamaged(header: Mapping[str, str], tensors: Mapping[str, np.ndarray], written: str) -> None:
    if written == "1":
        if "sha256" in header and header["sha256"] != _numbers_digest(tensors):
            raise ValueError("the numbers are not those that were written")
    elif header["sha256"] != digest(header, tensors):
        raise ValueError("its facts or numbers are not those that were written")


def in_order(content: bytes) -> bytes:
    """A safetensors file with its header in one order: the library writes the facts in any."""
    size = int.from_bytes(content[:8], "little")
    text = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _require_bounded(source: Path) -> None:
    try:
        read_header(source)
    except BadInput as error:
        raise BadInput(f"{source} is not a readable safetensors file: {error}") from None


# -- facts -------------------------------------------------------------------------------------------


def _facts(text: str) -> dict[str, Any]:
    """What the header says of a patch.

    Raises:
        KeyError, TypeError, ValueError: it is damaged.
    """
    facts = parse_json(text, "what it says of itself", finite=False)
    if not isinstance(facts, dict):
        raise ValueError(f"it says of itself {facts!r:.40}")
    allowed = FACTS | MORE_FACTS
    for name, value in facts.items():
        if name not in allowed or type(value) is not allowed[name]:
            raise ValueError(f"{name} is {value!r:.40}")
    if missing := FACTS.keys() - facts.keys():
        raise ValueError(f"without {', '.join(sorted(missing))}")
    if facts["dtype"] not in EPS:
        raise ValueError(f"dtype is {facts['dtype']!r:.40}")
    if facts["tokens"] not in MODES or not 0 < facts["context_length"] < 2**31 or not facts["query"]:
        raise ValueError("tokens, context_length or query is out of range")
    if not all(type(v) is str for v in (*facts.get("transposed", ()), *facts.get("tensors", {}).values())):
        raise ValueError("transposed or tensors holds what is no name")
    if not all(type(v) is str for v in facts["made_for"].values()):
        raise ValueError("made_for holds what is no text")
    if not all(type(v) in (int, float) for v in facts["measured"].values()):
        raise ValueError("measured holds what is no number")
    whole = {k: _integers(k, facts[k]) for k in ("query", "padding", "positions") if k in facts}
    _require_batch(whole, facts.get("batch", 1))
    names = {key: tuple(facts[key]) for key in ("transposed", "whole") if key in facts}
    return {**facts, **whole, **names}


def _require_streams(facts: Mapping[str, Any], contextual: Mapping[str, np.ndarray]) -> None:
    """Refuses contextual streams and floors that are not those of a patch with these facts."""
    rows = 1 if facts["tokens"] == "last" else len(facts["query"])
    for dtype, stream in contextual.items():
        fits = stream.ndim == 2 and len(stream) == rows and stream.dtype in (np.float32, np.float64)
        if dtype not in EPS or not fits or not np.isfinite(stream).all():
            raise ValueError(f"the contextual run in {dtype!r:.40} does not hold what a patch does")
    if contextual and facts["dtype"] not in contextual:
        raise ValueError(f"without the contextual run in {facts['dtype']}")
    for dtype, floor in facts.get("floors", {}).items():
        if dtype not in EPS or not isinstance(floor, float) or not 0 <= floor < np.inf:
            raise ValueError(f"the floor in {dtype!r:.40} is {floor!r:.40}")


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
    if len(positions) % tokens:
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


def _numbers_digest(tensors: Mapping[str, np.ndarray]) -> str:
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
