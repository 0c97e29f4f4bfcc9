"""Taking a patch off a model that was loaded, trained or wrapped meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch_models import apart, digest, ids
from torch_models import llama as drawn

from blockkit import BadInput
from blockkit.backends.pytorch import absorb
from blockkit.backends.pytorch.watching.intercepted import Intercepted


def llama() -> nn.Module:
    """The same numbers every time."""
    torch.manual_seed(0)
    return drawn()


def patched(merge: bool, **options: Any) -> tuple[nn.Module, Any]:
    model = llama()
    patch = absorb(model, ids(1, 12), ids(1, 3, seed=2), strategy="matrix", merge=merge, **options)
    patch.apply(model, merge=merge)
    return model, patch


def others() -> dict[str, torch.Tensor]:
    """Other weights for the same model."""
    return {name: value + 1 for name, value in llama().state_dict().items()}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_meanwhile_stay_without_the_patch(merge: bool, assign: bool) -> None:
    model, patch = patched(merge)
    plain = llama()
    plain.load_state_dict(others())
    model.load_state_dict(others(), assign=assign)
    if merge:
        with pytest.raises(BadInput, match=r"is no longer on this Llama.* hold other numbers than it put there"):
            patch.remove(model)
    elif assign:
        with pytest.warns(UserWarning, match=r"were exchanged while the patch .* was on"):
            patch.remove(model)
    else:
        patch.remove(model)
    assert digest(model) == digest(plain)
    assert not any(isinstance(p, Intercepted) for p in model.parameters())
    with pytest.raises(BadInput, match="is not on this"):
        patch.remove(model)


@pytest.mark.parametrize("assign", [False, True])
def test_the_models_own_weights_loaded_again_take_a_merged_patch_off(assign: bool) -> None:
    model, patch = patched(True)
    model.load_state_dict(llama().state_dict(), assign=assign)
    patch.remove(model)
    assert digest(model) == digest(llama())


def test_a_mixture_is_not_made_worse() -> None:
    model, patch = patched(True)
    name = sorted(patch.changes)[0]
    with torch.no_grad():
        model.get_parameter(name).add_(1.0)
    before = digest(model)
    with pytest.raises(BadInput, match=rf"^{name} hold other numbers .* nothing was changed; load all"):
        patch.remove(model)
    assert digest(model) == before
    model.load_state_dict(llama().state_dict())
    patch.remove(model)


@pytest.mark.parametrize("from_wrapper", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_a_patch_comes_off_a_model_that_was_wrapped(merge: bool, from_wrapper: bool) -> None:
    peft = pytest.importorskip("peft")
    model, patch = patched(merge)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj", "o_proj"])).eval()
    with pytest.raises(BadInput, match="already"):
        patch.apply(wrapped)
    patch.remove(wrapped if from_wrapper else model)
    with torch.no_grad():
        assert apart(wrapped(ids(1, 5)).logits, llama()(ids(1, 5)).logits) == 0
    assert digest(wrapped.unload()) == digest(llama())
