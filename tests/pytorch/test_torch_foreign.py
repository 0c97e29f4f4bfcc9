"""Models that were not made for this: odd configurations, quantised weights, another default dtype, offloaded."""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch_models import EXACT, apart, gemma, ids, llama

import blockkit
from blockkit import BadInput, NotPatchable
from blockkit.backends.pytorch import absorb


class Kind(enum.Enum):
    A = 1


def absorbed(model: nn.Module, **options: Any) -> Any:
    """The patch, tried by ordinary calls of the model."""
    context, query = ids(1, 12), ids(1, 3, seed=2)
    with torch.no_grad():
        wanted = model(torch.cat([context, query], 1)).logits[:, -1]
        patch = absorb(model, context, query, **options)
        with patch.applied(model):
            own = model(query, position_ids=patch.position_ids).logits[:, -1]
    scale = 0.05 if wanted.dtype in (torch.bfloat16, torch.float16) else EXACT  # in float64, too, norms run in float32
    assert apart(own, wanted) <= scale
    return patch


ODD: dict[str, Callable[[Any], Any]] = {
    "itself": lambda config: setattr(config, "me", config),
    "a member of an enumeration": lambda config: setattr(config, "kind", Kind.A),
    "both, deeper": lambda config: setattr(config, "deep", {"list": [config, {"kind": Kind.A}]}),
    "a class": lambda config: setattr(config, "made_by", type(config)),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_configuration_may_hold(kind: str) -> None:
    model = llama()
    ODD[kind](model.config)
    absorbed(model)


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("make", [llama, gemma])
def test_another_default_dtype(default_dtype: torch.dtype, make: Any) -> None:
    model = make()
    absorbed(model)
    absorbed(model.float())
    assert torch.get_default_dtype() is default_dtype


# -- numbers that lie elsewhere ------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_is_refused_as_that(where: str, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    for refused in (lambda: absorbed(model), lambda: blockkit.check(model)):
        with pytest.raises(BadInput, match=r"embed_tokens\.weight is offloaded: .* load the whole model into memory"):
            refused()


# -- quantised ---------------------------------------------------------------------------------------


def int8(model: nn.Module, but: str = "nothing") -> nn.Module:
    pytest.importorskip("torchao", reason="torchao is not installed")
    quantization = importlib.import_module("torchao.quantization")

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and but not in name

    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=chosen)
    return model


def quantised(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if type(p) is not nn.Parameter}


def test_beside_int8_weights_the_norms_and_what_was_left_out_move() -> None:
    model = int8(gemma())
    patch = absorbed(model)
    assert quantised(model) and not quantised(model) & patch.changes.keys()
    model = int8(llama(), but="down_proj")
    patch = absorbed(model, strategy="matrix", tokens="all")
    assert quantised(model) and all("down_proj" in name for name in patch.changes)


def test_the_verdict_knows_what_is_quantised() -> None:
    model = int8(llama())
    assert not blockkit.check(model, tokens=2).patchable
    with pytest.raises(NotPatchable):
        absorb(model, ids(1, 12), ids(1, 3, seed=2), tokens="all", strategy="matrix")
    assert blockkit.check(int8(llama(), but="down_proj"), tokens=2).patchable


def four_bits(model: nn.Module, *names: str) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.endswith(names):
            made = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32)
            made.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(path, made)
    return model.to("cpu").eval()


def test_beside_four_bit_weights_what_was_left_out_moves() -> None:
    model = four_bits(llama(), "gate_proj", "up_proj", "q_proj", "k_proj", "v_proj", "o_proj")
    assert model.model.layers[0].mlp.up_proj.weight.dtype is torch.uint8
    patch = absorbed(model, strategy="matrix", tokens="all")
    assert patch.changes and all("down_proj" in name for name in patch.changes)
