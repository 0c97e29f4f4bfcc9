"""A causal language model from a Hugging Face folder, as `transformers` loads it, with all of its tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from blockkit.checkpoint.folder import open_folder
from blockkit.errors import BadInput, blamed
from blockkit.extras import require


def _require_harmless(folder: Path) -> None:
    """Refuses a folder of which `transformers` could read what runs code, or what lies elsewhere.

    Raises:
        BadInput: its weights are pickles, it is an adapter of another model, its attention comes from elsewhere, or
            it is quantised.
    """
    config = open_folder(folder).config  # finds the weights: safetensors alone
    if (folder / "adapter_config.json").exists():
        raise BadInput(
            f"{folder} holds adapter_config.json, which names another model to load; merge the adapter first"
        )
    for section in (config, config.get("text_config")):
        for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
            chosen = section.get(key) if isinstance(section, dict) else None
            if chosen is not None and chosen not in ("eager", "sdpa"):
                raise BadInput(f"{folder}: {key} = {chosen!r:.100} is not allowed; eager and sdpa run no foreign code")


def load_model(folder: Path, dtype: str) -> nn.Module:
    """The model, ready to run.

    Raises:
        BadInput: the folder holds no such model, or not all of its tensors.
        MissingDependency: `transformers` is not installed.
    """
    _require_harmless(folder)
    transformers = require("transformers")
    transformers.utils.logging.disable_progress_bar()
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True,
            use_safetensors=True, trust_remote_code=False, weights_only=True,
        )  # fmt: skip
    except Exception as error:  # damaged configurations and files fail in many ways
        raise BadInput(f"transformers cannot load a causal language model from {folder}: {blamed(error)}") from None
    missing = sorted({*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])})
    if missing:
        raise BadInput(
            f"{folder} has no fitting tensor for {missing[0]} (of {len(missing)}), which transformers would draw at "
            "random; complete the checkpoint"
        )
    loaded: nn.Module = model.eval()
    return loaded
