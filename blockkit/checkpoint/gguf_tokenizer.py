"""The SentencePiece tokenizer in a GGUF file, rebuilt for the `tokenizers` package."""

from collections.abc import Sequence
from typing import Any, cast

from ..errors import BadInput
from ..extras import require
from .gguf_header import GgufHeader

_SPACE = "\u2581"  # how SentencePiece writes a space
_CONTROL, _USER_DEFINED = 3, 4
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def build_tokenizer(header: GgufHeader) -> Any:
    """Return the `tokenizers.Tokenizer` that the metadata of a GGUF file describes.

    Raises:
        BadInput: the file has no tokenizer, one of another kind, or a damaged one.
        MissingDependency: the package `tokenizers` is not installed.
    """
    tk = require("tokenizers")
    tokens, scores, kinds = _vocabulary(header)
    is_gemma = header.metadata["general.architecture"] == "gemma3"
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
    prefix = bool(header.metadata.get("tokenizer.ggml.add_space_prefix", True))
    _set_spaces(tk, tokenizer, is_gemma, prefix)
    _add_whole_tokens(tk, tokenizer, header, tokens, kinds)
    _set_template(tk, tokenizer, header)
    return tokenizer


def tokenizer_config(header: GgufHeader) -> dict[str, Any]:
    """Return the `tokenizer_config.json` with which AutoTokenizer loads the tokenizer as it is."""
    architecture = header.metadata["general.architecture"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": header.metadata[f"{architecture}.context_length"],
    }
    config |= {f"{role}_token": token for role, token in _role_tokens(header).items()}
    template = header.metadata.get("tokenizer.chat_template")
    return config | ({"chat_template": template} if template else {})


def _vocabulary(header: GgufHeader) -> tuple[list[str], list[float], list[int]]:
    """Return every token's text, score and kind, by id."""
    model = header.metadata.get("tokenizer.ggml.model")
    if model != "llama":
        raise BadInput(
            f"{header.path}: the tokenizer is of kind {model!r}; only 'llama' (SentencePiece) is "
            "supported. Use the model's Hugging Face folder instead."
        )
    tokens, scores, kinds = (_array(header, n) for n in ("tokens", "scores", "token_type"))
    rows = header.tensors["token_embd.weight"].shape[0]
    if not len(tokens) == len(scores) == len(kinds) <= rows:
        raise BadInput(
            f"{header.path}: the tokenizer has {len(tokens)} tokens, {len(scores)} scores and "
            f"{len(kinds)} kinds; they must be as many, and at most {rows}, the embedding's rows."
        )
    return [str(t) for t in tokens], [float(s) for s in scores], [int(k) for k in kinds]


def _array(header: GgufHeader, name: str) -> Sequence[Any]:
    value = header.metadata.get(f"tokenizer.ggml.{name}")
    if value is None or isinstance(value, str | int | float):
        raise BadInput(f"{header.path}: the metadata tokenizer.ggml.{name} must be an array.")
    return cast(Sequence[Any], value)


def _role_tokens(header: GgufHeader) -> dict[str, str]:
    """Return the text of the tokens that have a role: "bos", "eos", "unk", "pad"."""
    tokens = _array(header, "tokens")
    ids = {role: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
    for role, place in ids.items():
        if place is not None and not (isinstance(place, int) and 0 <= place < len(tokens)):
            raise BadInput(f"{header.path}: the {role} token id {place} is not in the vocabulary.")
    return {role: str(tokens[place]) for role, place in ids.items() if place is not None}


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
    bos = roles.get("bos") if header.metadata.get("tokenizer.ggml.add_bos_token", True) else None
    eos = roles.get("eos") if header.metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if bos is None and eos is None:
        return
    first, second = (
        [f"{part}:{number}" for part in (bos, text, eos) if part is not None]
        for number, text in enumerate(("$A", "$B"))
    )
    tokenizer.post_processor = tk.processors.TemplateProcessing(
        single=first,
        pair=first + second,
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in (bos, eos) if t is not None],
    )
