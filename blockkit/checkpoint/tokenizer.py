"""Text to token ids and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadInput
from ..extras import require

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer. `load_tokenizer` makes one."""

    backend: "tokenizers.Tokenizer"

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the token ids of `text`; `special` adds what the model expects (such as BOS)."""
        return list(self.backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self.backend.decode(ids, skip_special_tokens=False))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load `tokenizer.json` from a checkpoint folder.

    Raises:
        BadInput: the file is missing or malformed.
        MissingDependency: the package `tokenizers` is not installed.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise BadInput(
            f"{folder} has no tokenizer.json. Save the model's fast tokenizer there, with "
            "transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"
        )
    tokenizers = require("tokenizers")
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))
    except Exception as error:  # tokenizers raises nothing narrower
        raise BadInput(f"{file} is not a valid tokenizer file: {error}") from error
