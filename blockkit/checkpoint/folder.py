"""A Hugging Face checkpoint folder, read and rewritten tensor by tensor."""

import difflib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..atomic import new_folder
from ..errors import BadInput
from ..json_reader import read_json
from .dtypes import decode, encode
from .safetensors_file import StoredTensor, read_header

_SINGLE = "model.safetensors"
_LONGEST_NAME = 200
_INDEX = "model.safetensors.index.json"
_COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md", ""}


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint on disk. `open_folder` makes one; it holds no tensor values.

    Attributes:
        path: the folder.
        config: `config.json`, parsed.
        shapes: every tensor's shape by name, over all shards.
    """

    path: Path
    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, StoredTensor] = field(repr=False)

    def tensor(self, name: str) -> np.ndarray:
        """Read one tensor: float32 for F32, F16 and BF16 values, else the type it is stored in.

        Raises:
            BadInput: there is no such tensor, its type is not supported, or the file changed.
        """
        entry = self._entry(name)
        try:
            with entry.file.open("rb") as stream:
                stream.seek(entry.start)
                raw = stream.read(entry.stop - entry.start)
        except OSError as error:
            raise BadInput(f"cannot read tensor {name} from {entry.file}: {error}") from error
        if len(raw) != entry.stop - entry.start:
            raise BadInput(f"{entry.file} was cut short while it was in use (tensor {name}).")
        try:
            return decode(raw, entry.dtype).reshape(entry.shape)
        except BadInput as error:
            raise BadInput(f"tensor {name} in {entry.file}: {error}") from error

    def dtype_of(self, name: str) -> str:
        """Return the type a tensor is stored in, as safetensors spells it ("F32", "BF16", ...).

        Raises:
            BadInput: there is no such tensor.
        """
        return self._entry(name).dtype

    def _entry(self, name: str) -> StoredTensor:
        if name not in self.stored:
            close = difflib.get_close_matches(name, self.stored, n=3)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise BadInput(f"the checkpoint {self.path} has no tensor {name!r}.{hint}")
        return self.stored[name]


def open_folder(path: str | Path) -> CheckpointFolder:
    """Open a checkpoint folder: `config.json` and `model.safetensors` or its indexed shards.

    Raises:
        BadInput: something is missing, malformed or truncated; the message names the file.
    """
    try:
        folder = Path(path).expanduser()
    except RuntimeError as error:  # ~somebody
        raise BadInput(f"the checkpoint folder {path}: {error}") from None
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise BadInput(f"the checkpoint folder {folder} {problem}.")
    if not (folder / "config.json").is_file():
        raise BadInput(
            f"{folder} has no config.json; a Hugging Face checkpoint folder is needed, as save_pretrained writes it."
        )
    config = read_json(folder / "config.json", finite=False)  # some configurations hold Infinity
    require_not_quantised(config, folder)
    stored = _read_stored(folder)
    shapes = MappingProxyType({name: entry.shape for name, entry in stored.items()})
    return CheckpointFolder(folder, config, shapes, MappingProxyType(stored))


def require_not_quantised(config: Mapping[str, Any], folder: Path) -> None:
    """Refuses weights that are not stored as the numbers that they stand for.

    Raises:
        BadInput: the configuration says that they are quantised, and how.
    """
    how = config.get("quantization_config") or config.get("compression_config")
    if how is None:
        return
    said = [how[k] for k in ("quant_method", "fmt", "format", "bits") if isinstance(how, dict) and k in how]
    method = ", ".join(f"{s:.40}" if isinstance(s, str) else f"{s!r:.40}" for s in said) or "by no named method"
    raise BadInput(
        f"{folder} is quantised ({method}): its weights are packed or scaled, and a patch of them cannot be exact. "
        "Save the model in float32 or bfloat16 first (dequantised), or take its original checkpoint."
    )


def write_folder(
    source: CheckpointFolder,
    out: Path,
    changed: Mapping[str, np.ndarray],
    approve: Callable[[Path], None] | None = None,
) -> None:
    """Write a copy of `source` to `out` with the `changed` tensors replaced.

    Values are rounded to the type each tensor is stored in; all other bytes stay as they are, and so do the files'
    modes. The folder appears complete or not at all.

    Args:
        changed: new values by tensor name, each of the shape of the tensor it replaces.
        approve: is given the complete folder before it appears; what it raises keeps it from appearing.

    Raises:
        BadInput: `out` exists and is not empty or cannot be written, a changed tensor has an
            unknown name, another shape, or values that its stored type cannot hold, or a file of the
            folder is a link to outside of it.
    """
    for name, values in changed.items():
        _require_replaceable(source, name, values)
    small = _small_files(source)
    with new_folder(out) as partial:
        shards = sorted({entry.file for entry in source.stored.values()})
        copied = [*small, *shards]
        for file in copied:
            shutil.copyfile(file, partial / file.name)
        for name, values in changed.items():
            entry = source.stored[name]
            with (partial / entry.file.relative_to(source.path)).open("r+b") as stream:
                stream.seek(entry.start)
                stream.write(_encode_named(values, entry, name))
        for file in copied:
            shutil.copymode(file, partial / file.name)
        if approve is not None:
            approve(partial)


def _require_replaceable(source: CheckpointFolder, name: str, values: np.ndarray) -> None:
    source.dtype_of(name)
    if values.shape != source.shapes[name]:
        raise BadInput(
            f"tensor {name} must keep its shape {list(source.shapes[name])}, "
            f"and the new values have shape {list(values.shape)}."
        )


def _encode_named(values: np.ndarray, entry: StoredTensor, name: str) -> bytes:
    try:
        return encode(values, entry.dtype)
    except BadInput as error:
        raise BadInput(f"tensor {name} cannot be written: {error}") from error


def _small_files(source: CheckpointFolder) -> list[Path]:
    """List configuration, tokenizer, code and licence files; no weights of any other format."""
    files = (file for file in sorted(source.path.iterdir()) if file.is_file())
    indexed = not (source.path / _SINGLE).is_file()
    found = [
        file
        for file in files
        if file.suffix in _COPIED_SUFFIXES
        and not file.name.startswith(".")
        and (not file.name.endswith(".index.json") or (indexed and file.name == _INDEX))
    ]
    strange = [file.name for file in found if not _belongs(file, source.path)]
    if strange:
        raise BadInput(
            f"{source.path}: links to outside of the folder, whose content would be copied: {', '.join(strange[:5])}. "
            "Put the files themselves there, or remove the links."
        )
    return found


def _belongs(file: Path, folder: Path) -> bool:
    """Whether a file lies in its folder, or among the blobs of the model hub's cache whose snapshot the folder is."""
    real, home = file.resolve(), folder.resolve()
    places = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    return any(real.is_relative_to(place) for place in places)


def _read_stored(folder: Path) -> dict[str, StoredTensor]:
    if (folder / _SINGLE).is_file():
        return read_header(folder / _SINGLE)
    if (folder / _INDEX).is_file():
        return _read_shards(folder)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise BadInput(
            f"{folder} has weights only as .bin or .pt files, which are not supported: they "
            "can run code when read. Convert them once with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)"
        )
    raise BadInput(f"{folder} has no weights: {_SINGLE} or {_INDEX} is needed.")


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    index = folder / _INDEX
    placement = read_json(index).get("weight_map")
    if not isinstance(placement, dict):
        raise BadInput(f'{index} has no "weight_map" that says which file holds which tensor.')
    stored: dict[str, StoredTensor] = {}
    for shard in sorted({_shard_name(index, name) for name in placement.values()}):
        stored |= read_header(folder / shard)
    lost = sorted(placement.keys() - stored.keys())
    if lost:
        raise BadInput(f"{index} lists tensors that no shard holds: {', '.join(f'{n:.200}' for n in lost[:5])}.")
    return stored


def _shard_name(index: Path, name: Any) -> str:
    """A file beside the index, and one that cannot run code."""
    plain = isinstance(name, str) and Path(name).name == name and len(name) < _LONGEST_NAME and name.isprintable()
    if not plain or not (index.parent / name).is_file():
        raise BadInput(f"{index} names the shard {name!r:.100}, which is not in {index.parent}.")
    if not name.endswith(".safetensors"):
        raise BadInput(f"{index} names the shard {name}; only .safetensors files are read, others can run code.")
    return str(name)
