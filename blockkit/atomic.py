"""Files and folders that appear complete or not at all, and what a killed run left is swept by the next one.

What is being written stands beside its place under a name of its own, locked for as long as its process lives. A
partial file that nobody holds is thus what a killed run left.
"""

import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import BadInput

if os.name == "posix":
    import fcntl

_NAME = re.compile(r"\.blockkit-[0-9a-f]{12}\.partial")
_open: set[Path] = set()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty sibling folder of `out` to fill; rename it to `out` when the block succeeds.

    When the block fails in any way, Ctrl-C included, the sibling is removed and `out` is untouched.

    Raises:
        BadInput: `out` exists and is not an empty folder, or it cannot be written.
    """
    target = _place_of(out)
    _require_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(target.parent) as partial:
            yield partial
            for file in partial.rglob("*"):
                _flush(file)
            _flush(partial)
            if target.exists():
                target.rmdir()
            partial.rename(target)
            _flush(target.parent)
    except OSError as error:
        raise BadInput(
            f"cannot write the folder {out}: {error}. "
            "Choose a folder that you may write to, on a disk with enough free space."
        ) from error


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder inside `parent`, which is removed however the block ends.

    Raises:
        OSError: it cannot be made.
    """
    with _partial(parent, lambda path: path.mkdir()) as path:
        yield path


def _place_of(out: Path) -> Path:
    try:
        return out.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # ~somebody, links in a circle, a zero byte
        raise BadInput(f"cannot write the folder {str(out)!r:.300}: {error}") from None


def _require_free(target: Path) -> None:
    try:
        occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise BadInput(f"cannot look into the output folder {target}: {error}") from error
    if occupied:
        raise BadInput(
            f"the output folder {target} exists and is not an empty folder; "
            "nothing is ever overwritten: remove it or choose another name."
        )


def write_file(out: Path, content: bytes) -> None:
    """Writes a file; one that exists is replaced only when the new one is complete, and keeps its mode.

    A link stays, and what it points to is replaced.

    Raises:
        BadInput: `out` is a folder or the like, or it cannot be written.
    """
    try:
        target = out.resolve()
        if target.exists() and not target.is_file():
            raise BadInput(f"cannot write {out}: it exists and is not an ordinary file")
        with _partial(target.parent, lambda path: path.open("xb").close()) as partial:
            with partial.open("wb") as file:
                file.write(content)
            if target.exists():
                partial.chmod(stat.S_IMODE(target.stat().st_mode))
            _flush(partial)
            partial.replace(target)
            _flush(target.parent)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle; ValueError: no path at all
        raise BadInput(f"cannot write {str(out)!r:.200}: {getattr(error, 'strerror', None) or error}") from None


def abandon() -> None:
    """Removes what is being written, before a program ends without unwinding."""
    for path in list(_open):
        _remove(path)


@contextmanager
def _partial(parent: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """A file or folder of a name of its own in `parent`, locked while the block runs, and removed if still there."""
    _sweep(parent)
    path = parent / f".blockkit-{uuid.uuid4().hex[:12]}.partial"
    held = None
    _open.add(path)
    try:
        make(path)
        held = _locked(path)
        yield path
    finally:
        _remove(path)
        if held is not None:
            os.close(held)
        _open.discard(path)


def _sweep(parent: Path) -> None:
    """Removes what killed runs left in a folder."""
    with suppress(OSError):
        for path in [p for p in parent.iterdir() if _NAME.fullmatch(p.name) and p not in _open and not p.is_symlink()]:
            if (held := _locked(path)) is not None:
                _remove(path)
                os.close(held)


def _locked(path: Path) -> int | None:
    """The open, locked file or folder; None if another process holds it, or nothing can be locked here."""
    if os.name != "posix":  # nothing is locked, so nothing is swept
        return None
    try:
        found = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(found)
        return None
    return found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Has the disk hold a file, or the names in a folder, before the next step; a folder that cannot is let be."""
    if path.is_dir():
        with suppress(OSError):
            _fsync(path)
    else:
        _fsync(path)


def _fsync(path: Path) -> None:
    found = os.open(path, os.O_RDONLY)
    try:
        os.fsync(found)
    finally:
        os.close(found)
