"""Which model a patch is for: a digest over every parameter and buffer, and over what lies beside them.

The digest of a tensor is kept for as long as its memory, its version (which PyTorch counts up when it is written to)
and a sample of its numbers are the same. A write through `.data` is not counted; so when a model meets a patch for the
first time, everything is hashed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from blockkit.errors import BadInput
from blockkit.fingerprint import all_leaves, leaf, root
from blockkit.patch.patch import Patch

from ..watching.intercepted import Intercepted, bare
from .slots import find, named, require_plain

SAMPLE = 64  # numbers of a tensor that are looked at every time
AT_ONCE = 1 << 24  # bytes that are brought to the host at a time
WORDS = (4096, 4093)  # of the weights that are hashed at a time, in patch files of format 1
COVERS = "every parameter and buffer of the PyTorch model, changes that lie beside them, and which adapters are active"
ADAPTERS = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")  # of a layer that `peft` put in


@dataclass
class Known:
    """What was found of a model: leaves by the state in which its tensors were, and the patches that it met."""

    leaves: dict[str, tuple[Any, str]]
    met: WeakSet[Patch]


_KNOWN: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def fingerprint(model: nn.Module, met: Patch | None = None) -> dict[str, str]:
    """What a patch must find again.

    Args:
        met: the patch that is to be put on; the first time that the model meets it, nothing that was kept is trusted.

    Returns:
        `architecture`: the class, and a hash of all parameters' names, shapes and dtypes; `digest`: over all that
        `covers` says.

    Raises:
        BadInput: a tensor's numbers cannot be read.
    """
    known = _KNOWN.setdefault(model, Known({}, WeakSet()))
    if met is not None and met not in known.met:
        known.leaves.clear()
    tensors = dict(_tensors(model))
    states = dict(zip(tensors, _states(tensors.values()), strict=True))
    stale = {n: t for n, t in tensors.items() if n not in known.leaves or known.leaves[n][0] != states[n]}
    found = all_leaves({name: lambda n=name, t=tensor: _leaf(n, t) for name, tensor in stale.items()})  # type: ignore[misc]
    known.leaves = {n: (s, found[n] if n in found else known.leaves[n][1]) for n, s in states.items()}
    if met is not None:
        known.met.add(met)
    leaves = {name: digest for name, (_, digest) in known.leaves.items()}
    return {"architecture": architecture(model), "covers": COVERS, "digest": root(leaves | _beside(model))}


def introduce(model: nn.Module, patch: Patch) -> None:
    """Says that a patch was made from the model's fingerprint just now: putting it on need not look again."""
    _KNOWN.setdefault(model, Known({}, WeakSet())).met.add(patch)


def architecture(model: nn.Module) -> str:
    """The model's class, and a hash of all parameters' names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(named(model).items()):
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode())
    kind = type(model)
    return f"{kind.__module__}.{kind.__qualname__} {digest.hexdigest()[:16]}"


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer once, under the first of its names."""
    for name, parameter in model.named_parameters():
        yield f"parameter {name}", bare(parameter).detach()
    for name, buffer in model.named_buffers():
        yield f"buffer {name}", buffer.detach()


def _states(tensors: Iterable[Tensor]) -> list[Any]:
    """What tells whether a tensor is as it was, without reading all of it."""
    listed = list(tensors)
    samples: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for i, tensor in enumerate(listed):
        if _readable(tensor) and tensor.numel():
            flat = tensor.view(-1) if tensor.is_contiguous() else tensor[(0,) * (tensor.dim() - 1)]
            step = max(1, len(flat) // SAMPLE)
            samples.setdefault((tensor.device, tensor.dtype), []).append((i, flat[::step][:SAMPLE]))
    seen: dict[int, bytes] = {}
    for own in samples.values():
        joined = _bytes(torch.cat([s for _, s in own]))
        width, start = len(joined) // sum(len(s) for _, s in own), 0
        for i, sample in own:
            seen[i] = joined[start : start + width * len(sample)]
            start += width * len(sample)
    return [(_place(t), seen.get(i)) for i, t in enumerate(listed)]


def _place(tensor: Tensor) -> Any:
    version = None if tensor.is_inference() else tensor._version
    pointer = tensor.data_ptr() if _readable(tensor) else id(tensor)
    return pointer, version, tuple(tensor.shape), str(tensor.dtype), str(tensor.device)


def _readable(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.layout is torch.strided and not hasattr(tensor, "__tensor_flatten__")


def _leaf(name: str, tensor: Tensor) -> str:
    """The digest of one tensor: of its numbers, of the tensors it is made of, or of the fact that it is not loaded."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        return leaf(f"{dtype}, not loaded", shape, ())
    try:
        if hasattr(tensor, "__tensor_flatten__"):
            parts = tensor.__tensor_flatten__()[0]
            return root({part: _leaf(f"{name}.{part}", getattr(tensor, part)) for part in parts})
        return leaf(dtype, shape, _pieces(tensor.to_dense() if tensor.layout is not torch.strided else tensor))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise BadInput(f"the numbers of the {name}, a {type(tensor).__name__}, cannot be read: {error}") from None


def _pieces(tensor: Tensor) -> Iterator[Any]:
    flat = tensor.contiguous().reshape(-1)
    step = max(1, AT_ONCE // max(1, flat.element_size()))
    for start in range(0, len(flat), step):
        yield _buffer(flat[start : start + step])


def _buffer(flat: Tensor) -> memoryview:
    return memoryview(flat.contiguous().view(torch.uint8).cpu().numpy())


def _bytes(flat: Tensor) -> bytes:
    return bytes(_buffer(flat))


def _beside(model: nn.Module) -> dict[str, str]:
    """Leaves of what the model's calls read that is no tensor of its own: changes kept as factors, active adapters."""
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        layers = []
        while isinstance(parameter, Intercepted):
            if (digest := getattr(parameter.handler, "digest", None)) is not None:
                layers.append(digest(name))
            parameter = parameter.plain
        if any(layers):
            found[f"beside {name}"] = leaf("changes", (len(layers),), layers)
    for path, module in model.named_modules():
        if isinstance(getattr(type(module), "active_adapters", None), property):
            state = [f"{key} {getattr(module, key, None)!r}\n".encode() for key in ADAPTERS]
            found[f"adapters {path}"] = leaf("adapters", (), state)
    return found


# -- patch files of format 1 -------------------------------------------------------------------------


def digest_of(model: nn.Module, names: Iterable[str]) -> str:
    """A hash of sums over some slots' words, and of the changes kept beside them, as files of format 1 hold it."""
    weights, parameters = hashlib.sha256(), named(model)
    for name, slot in sorted(find(model, names).items()):
        require_plain(slot)
        weights.update(f"{name} {list(slot.tensor.shape)} {slot.tensor.dtype}\n".encode())
        _add_sums(weights, slot.tensor)
        above = parameters[slot.parameter]
        while isinstance(above, Intercepted):
            if (digest := getattr(above.handler, "digest", None)) is not None:
                weights.update(digest(slot.parameter))
            above = above.plain
    return weights.hexdigest()


def _add_sums(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Adds sums of the tensor's words by their places modulo two numbers without a common factor."""
    flat = tensor.contiguous().reshape(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    for words in WORDS:
        rest = len(flat) % words
        sums = flat[: len(flat) - rest].reshape(-1, words).sum(0, dtype=torch.int64)
        digest.update(sums.cpu().numpy().tobytes())
        digest.update(flat[len(flat) - rest :].cpu().numpy().tobytes())


def is_same(model: nn.Module, made_for: Mapping[str, str], patch: Patch) -> bool:
    """Whether the model has the values that the patch was made for."""
    if "digest" in made_for:
        return fingerprint(model, patch)["digest"] == made_for["digest"]
    return digest_of(model, patch.changes) == made_for.get("weights")
