"""Small random models of transformers, in float32, and what tests ask of them."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from blockkit.backends.pytorch import Patch

SIZES: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
EXACT = 1e-5  # float32, logits of order one


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def llama() -> nn.Module:
    return shaken(LlamaForCausalLM(LlamaConfig(**SIZES)))


def gemma() -> nn.Module:
    return shaken(Gemma3ForCausalLM(Gemma3TextConfig(**SIZES)))


def gpt2() -> nn.Module:
    return shaken(
        GPT2LMHeadModel(GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))
    )


def mixtral() -> nn.Module:
    return shaken(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)))


def mamba() -> nn.Module:
    return shaken(MambaForCausalLM(MambaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=2, state_size=4)))


def opt() -> nn.Module:
    """Takes its positions from the attention mask, so a query on its own stands elsewhere."""
    config = OPTConfig(vocab_size=120, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                       word_embed_proj_dim=32)  # fmt: skip
    return shaken(OPTForCausalLM(config))


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(seed))


def positions(model: nn.Module, patch: Patch) -> dict[str, Tensor]:
    takes = "position_ids" in inspect.signature(model.forward).parameters
    return {"position_ids": patch.position_ids} if takes else {}


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
