"""The tokenizer in a GGUF file, SentencePiece or byte-level BPE, rebuilt for the `tokenizers` package."""

from typing import Any

import numpy as np

from ..errors import BadInput
from ..extras import require
from .gguf_bytes import byte_level, byte_level_kind
from .gguf_header import GgufHeader
from .tokenizer import guarded

_SPACE = "\u2581"  # how SentencePiece writes a space
_CONTROL, _USER_DEFINED = 3, 4
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_MOST_WORK = 10**9  # characters looked at to find the merges; a real vocabulary takes 10 ** 7


def build_tokenizer(header: GgufHeader) -> Any:
    """Return the `tokenizers.Tokenizer` that the metadata of a GGUF file describes.

    Raises:
        BadInput: the file has no tokenizer, one of another kind, or a damaged one.
        MissingDependency: the package `tokenizers` is not installed.
    """
    tk = require("tokenizers")
    kind = header.text("tokenizer.ggml.model")
    if kind not in ("llama", "gpt2"):
        raise BadInput(
            f"{header.path}: the tokenizer is of kind {kind!r:.100}; 'llama' (SentencePiece) and 'gpt2' (byte-level "
            "BPE) are supported. Use the model's Hugging Face folder instead."
        )
    with guarded(f"{header.path}: the tokenizer is damaged"):
        tokens = _tokens(header)
        kinds = _kinds(header, len(tokens))
        tokenizer = _sentencepiece(tk, header, tokens) if kind == "llama" else byte_level(tk, header, tokens)
        _add_whole_tokens(tk, tokenizer, header, tokens, kinds)
        _set_template(tk, tokenizer, header)
    return tokenizer


def tokenizer_config(header: GgufHeader) -> dict[str, Any]:
    """Return the `tokenizer_config.json` with which AutoTokenizer loads the tokenizer as it is."""
    architecture = header.text("general.architecture")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": header.whole(f"{architecture}.context_length"),
    }
    config |= {f"{role}_token": token for role, token in _role_tokens(header).items()}
    template = header.text("tokenizer.chat_template")
    return config | ({"chat_template": template} if template else {})


def _tokens(header: GgufHeader) -> list[str]:
    """Return every token's text, by id."""
    tokens, rows = header.texts("tokenizer.ggml.tokens"), header.tensors["token_embd.weight"].shape[0]
    if not 0 < len(tokens) <= rows:
        raise BadInput(
            f"{header.path}: the tokenizer has {len(tokens)} tokens; at most {rows}, the embedding's rows, are allowed."
        )
    if sum(len(t) ** 2 for t in tokens) > _MOST_WORK:
        raise BadInput(f"{header.path}: its tokens are far too long; the longest has {max(map(len, tokens))} letters.")
    return tokens


def _kinds(header: GgufHeader, count: int) -> list[int]:
    """Return every token's kind, by id."""
    return [int(k) for k in _beside(header, "token_type", count)]


def _beside(header: GgufHeader, name: str, count: int) -> np.ndarray:
    found = header.numbers(f"tokenizer.ggml.{name}")
    if len(found) != count:
        raise BadInput(f"{header.path}: the tokenizer has {count} tokens and {len(found)} of {name}; as many are due.")
    return found


def _sentencepiece(tk: Any, header: GgufHeader, tokens: list[str]) -> Any:
    scores = [float(s) for s in _beside(header, "scores", len(tokens))]
    is_gemma = str(header.text("general.architecture")).startswith("gemma")
    # Gemma's runs of spaces are stored as spaces, and its merges rank by place, not by score.
    pieces = [_respelled(token) for token in tokens] if is_gemma else tokens
    ranks = [-float(place) for place in range(len(tokens))] if is_gemma else scores
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    model = tk.models.BPE(
        vocab=vocabulary,
        merges=_merges(vocabulary, dict(zip(pieces, ranks, strict=True))),
        unk_token=_role_tokens(header).get("unk"),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tk.Tokenizer(model)
    _set_spaces(tk, tokenizer, is_gemma, header.flag("tokenizer.ggml.add_space_prefix", True))
    return tokenizer


def _role_tokens(header: GgufHeader) -> dict[str, str]:
    """Return the text of the tokens that have a role: "bos", "eos", "unk", "pad"."""
    tokens = header.texts("tokenizer.ggml.tokens")
    ids = {role: header.token_id(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
    for role, place in ids.items():
        if place is not None and place >= len(tokens):
            raise BadInput(f"{header.path}: the {role} token id {place} is not in the vocabulary.")
    return {role: tokens[place] for role, place in ids.items() if place is not None}


def _respelled(token: str) -> str:
    return _SPACE * len(token) if token and not token.strip(" ") else token


def _merges(vocabulary: dict[str, int], ranks: dict[str, float]) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes a piece, the best-ranked pieces first."""
    cuts = [
        (rank, cut, piece)
        for piece, rank in ranks.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    cuts.sort(key=lambda c: (c[0], c[1], len(c[2]) - c[1]), reverse=True)
    return [(piece[:cut], piece[cut:]) for _, cut, piece in cuts]


def _set_spaces(tk: Any, tokenizer: Any, is_gemma: bool, prefix: bool) -> None:
    decoders = [tk.decoders.Replace(_SPACE, " "), tk.decoders.ByteFallback(), tk.decoders.Fuse()]
    if is_gemma:
        tokenizer.normalizer = tk.normalizers.Replace(" ", _SPACE)
        tokenizer.pre_tokenizer = tk.pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = tk.pre_tokenizers.Metaspace(_SPACE, scheme, split=False)
        decoders += [tk.decoders.Strip(" ", left=1)] if prefix else []
    tokenizer.decoder = tk.decoders.Sequence(decoders)


def _add_whole_tokens(tk: Any, tokenizer: Any, header: GgufHeader, tokens: list[str], kinds: list[int]) -> None:
    """Let control and user-defined tokens match whole in the text, before any merge."""
    roles = set(_role_tokens(header).values())
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL or t in roles]
    known = tokenizer.get_vocab(with_added_tokens=False)
    defined = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED and t in known]
    tokenizer.add_special_tokens([tk.AddedToken(t, normalized=False) for t in control])
    tokenizer.add_tokens([tk.AddedToken(t, normalized=False) for t in defined])


def _set_template(tk: Any, tokenizer: Any, header: GgufHeader) -> None:
    """Put BOS before and EOS after a text, where the file asks for them."""
    roles = _role_tokens(header)
    usual = header.text("tokenizer.ggml.model") == "llama" or byte_level_kind(header).begins
    bos = roles.get("bos") if header.flag("tokenizer.ggml.add_bos_token", usual) else None
    eos = roles.get("eos") if header.flag("tokenizer.ggml.add_eos_token", False) else None
    parts = [] if tokenizer.post_processor is None else [tokenizer.post_processor]
    if bos is not None or eos is not None:
        first, second = (
            [f"{part}:{number}" for part in (bos, text, eos) if part is not None]
            for number, text in enumerate(("$A", "$B"))
        )
        parts.append(
            tk.processors.TemplateProcessing(
                single=first,
                pair=first + second,
                special_tokens=[(t, tokenizer.token_to_id(t)) for t in (bos, eos) if t is not None],
            )
        )
    if parts:
        tokenizer.post_processor = parts[0] if len(parts) == 1 else tk.processors.Sequence(parts)
