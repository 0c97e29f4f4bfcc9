"""A causal language model from a Hugging Face folder, as `transformers` loads it, with all of its tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from blockkit.errors import BadInput, blamed
from blockkit.extras import require


def load_model(folder: Path, dtype: str) -> nn.Module:
    """The model, ready to run.

    Raises:
        BadInput: the folder holds no such model, or not all of its tensors.
        MissingDependency: `transformers` is not installed.
    """
    transformers = require("transformers")
    transformers.utils.logging.disable_progress_bar()
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
        )
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
