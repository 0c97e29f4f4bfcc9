"""Folders and files that appear complete or not at all."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import BadInput


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty sibling folder of `out` to fill; rename it to `out` when the block succeeds.

    When the block fails in any way, Ctrl-C included, the sibling is removed and `out` is untouched.

    Raises:
        BadInput: `out` exists and is not an empty folder, or it cannot be written.
    """
    target = out.expanduser().resolve()
    _require_free(target)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise BadInput(
            f"cannot write the folder {out}: {error}. "
            "Choose a folder that you may write to, on a disk with enough free space."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    """Writes a file; one that exists is replaced only when the new one is complete.

    Raises:
        BadInput: `out` is a folder or the like, or it cannot be written.
    """
    partial = out.with_name(f".{uuid.uuid4().hex[:12]}.partial")
    try:
        if out.exists() and not out.is_file():
            raise BadInput(f"cannot write {out}: it exists and is not an ordinary file")
        try:
            with partial.open("xb") as file:
                file.write(content)
            partial.replace(out)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: no path at all
        raise BadInput(f"cannot write {str(out)!r:.200}: {getattr(error, 'strerror', None) or error}") from None
