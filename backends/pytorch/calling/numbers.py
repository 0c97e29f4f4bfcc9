"""Parameters whose numbers are not there, or are kept in another form than they seem: quantised, sharded, offloaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blockkit.errors import BadInput

NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def foreign(tensor: Tensor) -> str | None:
    """Why a parameter's numbers cannot be read and changed where they lie; None for an ordinary one."""
    if type(tensor) not in (nn.Parameter, Tensor):
        return f"is a {type(tensor).__module__}.{type(tensor).__qualname__} (quantised, sharded or not yet initialised)"
    if tensor.dtype not in NUMBERS:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in NUMBERS)
        return f"holds {str(tensor.dtype).removeprefix('torch.')} (quantised?), not one of {allowed}"
    return None


def readable(name: str, tensor: Tensor) -> Tensor:
    """The numbers that a parameter stands for, as a dense tensor; a quantised one may know how.

    Raises:
        BadInput: it does not.
    """
    if type(tensor) in (nn.Parameter, Tensor) and tensor.dtype in NUMBERS:
        return tensor
    try:
        found = tensor.dequantize()
    except Exception:  # whatever a package raises that has none
        found = None
    if not isinstance(found, Tensor) or found.dtype not in NUMBERS or found.shape != tensor.shape:
        raise BadInput(f"{name} {foreign(tensor)}, and does not tell its numbers; absorb with freeze=[...] for others")
    return found


def require_numbers(model: nn.Module) -> None:
    """Refuses a model of which a parameter has no numbers in its place.

    Raises:
        BadInput: it is on the meta device, or offloaded, with what to do.
    """
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            name = f"{path}.{key}" if path else key
            if hasattr(module, "_hf_hook"):  # as accelerate marks a module whose numbers come when it runs
                raise BadInput(
                    f"{name} is offloaded: its numbers lie on the CPU or disk and are there only while its module "
                    "runs, so that they cannot be watched; load the whole model into memory (without device_map, "
                    'cpu_offload or disk_offload; device_map="cpu" holds all of it)'
                )
            raise BadInput(
                f"{name} is on the meta device and has no numbers, without which no block can be found and nothing "
                "can run: load the weights first, or judge a small model of the same class"
            )
