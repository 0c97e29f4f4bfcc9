"""Small random models of the Hugging Face classes, in the float64 that their code does not mean to run in."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is needed to compare with the Hugging Face classes")
transformers = pytest.importorskip("transformers", reason="transformers is needed to compare with its classes")
from torch.overrides import TorchFunctionMode  # noqa: E402

VOCABULARY = 61
GEMMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8,
    "sliding_window": 5, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MASKED = ("bert",)  # these predict the token itself, not the next one


class InFloat64(TorchFunctionMode):
    """Where the Hugging Face classes ask for float32 (norms, rotary tables, softmax), they get float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*wide, **named)


@contextmanager
def in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InFloat64(), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Pair:
    """One random model: the Hugging Face class in float64, and the folder that it was saved to."""

    theirs: Any
    path: Path

    def logits(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits `[tokens, vocabulary]` of the class in float64."""
        with in_float64():
            found = logits_of_class(self.theirs, ids, positions)
        assert found.dtype == np.float64
        return found


def auto_class(model_type: str) -> Any:
    return transformers.AutoModelForMaskedLM if model_type in MASKED else transformers.AutoModelForCausalLM


def logits_of_class(theirs: Any, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Logits `[tokens, vocabulary]`; `positions` are given to classes that take them."""
    given = {
        "input_ids": torch.tensor(np.array(ids))[None],
        "position_ids": torch.tensor(np.array(positions))[None],
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "use_cache": False,
    }
    taken = inspect.signature(theirs.forward).parameters
    with torch.no_grad():
        out = theirs(**{name: value for name, value in given.items() if name in taken})
    return np.asarray(out.logits[0].numpy())


def make(path: Path, model_type: str, settings: dict[str, Any], seed: int = 7) -> Pair:
    """A model with every weight random: matrices of scale 1/sqrt(d_in), norms and biases of order 1/2."""
    generator = torch.Generator().manual_seed(seed)
    config = transformers.CONFIG_MAPPING[model_type](**json.loads(json.dumps(settings)))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the grouped product wants float32, and rows of 16 bytes
    with in_float64():
        theirs = auto_class(model_type).from_config(config, attn_implementation="eager").eval()
        for name, p in theirs.named_parameters():
            one = 1.0 if p.ndim == 1 and name.endswith("weight") and not model_type.startswith("gemma") else 0.0
            scale = 0.5 if p.ndim == 1 else p.shape[-1] ** -0.5
            p.copy_(one + scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        theirs.save_pretrained(path)
    return Pair(theirs, path)


def loaded(model_type: str, path: Path) -> Any:
    """The class in float32, from a folder."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    found = auto_class(model_type).from_pretrained(path, dtype=torch.float32, **eager)
    return found.eval()


def some_ids(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCABULARY, count)
