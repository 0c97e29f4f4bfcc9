"""The byte-level BPE tokenizers of GGUF files (kind `gpt2`): SmolLM2, Llama 3, Qwen and GPT-2."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput
from .gguf_header import GgufHeader

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Kind:
    """How a text is cut into words before any merge, by the name that llama.cpp has for it.

    Attributes:
        words: the regular expression of a word; None for that of GPT-2.
        digits: whether every digit is a word of its own first.
        composed: whether the text is normalised to composed characters (NFC).
        whole: whether a word that is a token is taken before any merge.
        begins: whether BOS is put before a text where the file does not say.
    """

    words: str | None = None
    digits: bool = False
    composed: bool = False
    whole: bool = False
    begins: bool = False


_LLAMA3 = Kind(_WORDS % "{1,3}", whole=True, begins=True)
_QWEN2 = Kind(_WORDS % "", composed=True)
KINDS: Mapping[str, Kind] = {
    "gpt-2": Kind(),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "smollm": Kind(digits=True),
}


def byte_level_kind(header: GgufHeader) -> Kind:
    """How the tokenizer of a file cuts texts.

    Raises:
        BadInput: it does not say, or says what is not supported; another cut would give other tokens.
    """
    name = header.text("tokenizer.ggml.pre")
    if name is None or name not in KINDS:
        found = "does not say" if name is None else f"says {name!r:.100}"
        raise BadInput(
            f"{header.path}: how its tokenizer cuts texts into words, tokenizer.ggml.pre, must be one of "
            f"{', '.join(KINDS)}; the file {found}. Use the model's Hugging Face folder instead."
        )
    return KINDS[name]


def byte_level(tk: Any, header: GgufHeader, tokens: list[str]) -> Any:
    """The tokenizer with its vocabulary and merges; special tokens are still to be added.

    Raises:
        BadInput: merges are missing or are no pairs of tokens.
    """
    kind, vocabulary = byte_level_kind(header), {token: place for place, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in header.texts("tokenizer.ggml.merges")]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise BadInput(f"{header.path}: the tokenizer's merge {' '.join(merge)!r:.100} is no pair of its tokens.")
    tokenizer = tk.Tokenizer(tk.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind.whole))
    if kind.composed:
        tokenizer.normalizer = tk.normalizers.NFC()
    steps = [tk.pre_tokenizers.Digits(individual_digits=True)] if kind.digits else []
    if kind.words is not None:
        steps.append(tk.pre_tokenizers.Split(tk.Regex(kind.words), "isolated"))
    steps.append(tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.words is None))
    tokenizer.pre_tokenizer = tk.pre_tokenizers.Sequence(steps)
    tokenizer.decoder = tk.decoders.ByteLevel()
    tokenizer.post_processor = tk.processors.ByteLevel(trim_offsets=False)
    return tokenizer
