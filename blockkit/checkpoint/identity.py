"""The digest of a checkpoint's tensors, found once for a file as long as it is not written again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..atomic import write_file
from ..errors import BadInput
from ..fingerprint import all_leaves, leaf, root
from ..json_reader import parse_json
from .cache import cache_folder
from .folder import CheckpointFolder
from .safetensors_file import StoredTensor

AT_ONCE = 1 << 22
SETTLED = 2.0  # seconds after which another write would show in a file's time


def tensors_digest(folder: CheckpointFolder, names: Iterable[str]) -> str:
    """One digest over the stored bytes, shapes and dtypes of these tensors.

    Raises:
        BadInput: a file cannot be read, or was cut short.
    """
    wanted = set(names)
    files = {folder.stored[name].file for name in wanted}
    leaves: dict[str, str] = {}
    for file in sorted(files):
        own = {name: entry for name, entry in folder.stored.items() if entry.file == file}
        leaves |= _of_file(file, own)
    return root({name: leaves[name] for name in wanted})


def _of_file(file: Path, entries: Mapping[str, StoredTensor]) -> dict[str, str]:
    """The digest of every tensor in a file, remembered by the file's place, inode, size and times."""
    try:
        status = file.stat()
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error}") from error
    identity = f"{file.resolve()}\n{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    known = _remembered(identity)
    if known is None or not entries.keys() <= known.keys():
        known = all_leaves({name: lambda e=entry: _leaf(e) for name, entry in entries.items()})  # type: ignore[misc]
        if time.time() - status.st_ctime > SETTLED:
            _remember(identity, known)
    return known


def _leaf(entry: StoredTensor) -> str:
    return leaf(entry.dtype, entry.shape, _pieces(entry))


def _pieces(entry: StoredTensor) -> Iterator[bytes]:
    try:
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            left = entry.stop - entry.start
            while left:
                piece = stream.read(min(AT_ONCE, left))
                if not piece:
                    raise BadInput(f"{entry.file} was cut short while it was in use")
                left -= len(piece)
                yield piece
    except OSError as error:
        raise BadInput(f"cannot read {entry.file}: {error}") from error


def _note(identity: str) -> Path:
    return cache_folder("tensors") / hashlib.sha256(identity.encode()).hexdigest()


def _remembered(identity: str) -> dict[str, str] | None:
    """What was found before; None where nothing is, or what is there is no such note."""
    with suppress(BadInput, OSError, ValueError):
        note = _note(identity)
        found: Any = parse_json(note.read_text(encoding="utf-8"), str(note))
        if isinstance(found, dict) and all(type(v) is str and len(v) == 64 for v in found.values()):
            return found
    return None


def _remember(identity: str, leaves: Mapping[str, str]) -> None:
    with suppress(BadInput, OSError):  # a cache that cannot be written only costs time
        write_file(_note(identity), json.dumps(leaves).encode())
