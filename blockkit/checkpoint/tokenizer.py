"""Text to token ids and back."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadInput, BlockkitError
from ..extras import require

if TYPE_CHECKING:
    import tokenizers

_MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer. `load_tokenizer` makes one."""

    backend: "tokenizers.Tokenizer"
    source: str = "the tokenizer"

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the token ids of `text`; `special` adds what the model expects (such as BOS).

        A text that already begins with what would be put before it, as a rendered chat template does, keeps that
        one alone.

        Raises:
            BadInput: the tokenizer fails on this text.
        """
        with guarded(f"{self.source} fails on this text"):
            ids = list(self.backend.encode(text, add_special_tokens=special).ids)
            return ids if not special else self._begun_once(text, ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens included.

        Raises:
            BadInput: the tokenizer fails on these ids.
        """
        with guarded(f"{self.source} fails on these tokens"):
            return str(self.backend.decode(ids, skip_special_tokens=False))

    def _begun_once(self, text: str, ids: list[int]) -> list[int]:
        """The ids without the special tokens put before a text that begins with them itself."""
        plain = list(self.backend.encode(text, add_special_tokens=False).ids)
        added = list(self.backend.encode("", add_special_tokens=True).ids)
        for size in range(len(added), 0, -1):
            begin = added[:size]
            if plain[:size] == begin and ids[: 2 * size] == begin + begin:
                return ids[size:]
        return ids


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load `tokenizer.json` from a checkpoint folder.

    Truncation and padding that were left switched on in the file are switched off: a context is taken whole.

    Raises:
        BadInput: the file is missing, malformed or too large.
        MissingDependency: the package `tokenizers` is not installed.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise BadInput(
            f"{folder} has no tokenizer.json. Save the model's fast tokenizer there, with "
            "transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"
        )
    if file.stat().st_size > _MOST_BYTES:
        raise BadInput(f"{file} is larger than {_MOST_BYTES >> 20} MiB; no tokenizer is")
    tokenizers = require("tokenizers")
    with guarded(f"{file} is not a valid tokenizer file"):
        backend = tokenizers.Tokenizer.from_file(str(file))
        backend.no_truncation()
        backend.no_padding()
    return Tokenizer(backend, str(file))


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turns whatever the package `tokenizers` raises into one error.

    It raises plain `Exception`s; its panics come as a `BaseException` of a class that cannot be imported.

    Raises:
        BadInput: anything was raised but what ends the program.
    """
    try:
        with _unheard():
            yield
    except (BlockkitError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise BadInput(f"{what}: {' '.join(str(error).split()) or type(error).__name__:.300}") from None


@contextmanager
def _unheard() -> Iterator[None]:
    """Standard error closed for a while: a panic writes its own trace there, past Python, before it is caught."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
