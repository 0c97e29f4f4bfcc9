"""Models behind wrappers, and models that count positions by themselves: every token stands where an ordinary call
puts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_models import EXACT, apart, gpt2, ids, llama, shaken
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from blockkit import BadInput
from blockkit.backends.pytorch import absorb
from blockkit.backends.pytorch.calling.interface import Interface


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class LosesPositions(Wrapper):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("position_ids", None)
        return self.inner(*args, **kwargs)


def lora(task: str | None) -> Callable[[nn.Module], nn.Module]:
    peft = pytest.importorskip("peft")

    def wrapped(model: nn.Module) -> nn.Module:
        target = "c_fc" if hasattr(model, "transformer") else "up_proj"
        return peft.get_peft_model(model, peft.LoraConfig(task_type=task, target_modules=[target])).eval()

    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: Wrapper(model).eval(),
    "twice": lambda model: Wrapper(Wrapper(model)).eval(),
    "peft": lambda model: lora(None)(model),
    "peft for language models": lambda model: lora("CAUSAL_LM")(model),
}


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_left_padded_rows_behind_a_wrapper_are_those_of_the_prompts_alone(kind: str, make: Any) -> None:
    model = make()
    wrapped, context, query = WRAPPERS[kind](model), ids(2, 12), ids(2, 3, seed=2)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    alone = [model(torch.cat([context[:1, 5:], query[:1]], 1)), model(torch.cat([context[1:], query[1:]], 1))]
    wanted = torch.cat([found.logits[:, -1] for found in alone])
    patch = absorb(wrapped, context, query, context_mask=mask)
    assert patch.position_ids.tolist() == [[7, 8, 9], [12, 13, 14]]
    with patch.applied(wrapped):
        own = wrapped(query, position_ids=patch.position_ids).logits[:, -1]
    assert apart(own, wanted) < EXACT


@pytest.mark.parametrize("kind", WRAPPERS)
def test_embeddings_go_where_a_wrapper_leads(kind: str) -> None:
    model = llama()
    wrapped, context, query = WRAPPERS[kind](model), ids(1, 9), ids(1, 2, seed=2)
    embedded = model.get_input_embeddings()(context)
    wanted = model(torch.cat([context, query], 1)).logits[:, -1]
    patch = absorb(wrapped, embedded, query)
    with patch.applied(wrapped):
        assert apart(wrapped(query, position_ids=patch.position_ids).logits[:, -1], wanted) < EXACT


def test_padding_is_refused_where_positions_get_lost() -> None:
    wrapped, context, query = LosesPositions(gpt2()).eval(), ids(2, 12), ids(2, 3, seed=2)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    with pytest.raises(BadInput, match=r"row 1 is padded .* LosesPositions\.forward does not hand position_ids on"):
        absorb(wrapped, context, query, context_mask=mask)
    patch = absorb(wrapped, context, query)  # rows of one length need none
    with patch.applied(wrapped):
        own = wrapped(query).logits[:, -1]
    assert apart(own, wrapped(torch.cat([context, query], 1)).logits[:, -1]) < EXACT


def test_padding_is_no_matter_where_only_distances_count() -> None:
    wrapped, context, query = LosesPositions(llama()).eval(), ids(2, 12), ids(2, 3, seed=2)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    absorb(wrapped, context, query, context_mask=mask)


def test_what_a_wrapper_takes_is_measured() -> None:
    assert "position_ids" in Interface.of(Wrapper(gpt2()).eval()).takes
    found = Interface.of(LosesPositions(gpt2()).eval())
    assert "position_ids" not in found.takes and "input_ids" in found.takes
    assert found.loses == "LosesPositions.forward does not hand position_ids on to its GPT2LMHeadModel"


# -- a model that gives each token three positions ----------------------------------------------------

IMAGE, START = 90, 91


def qwen2_vl() -> nn.Module:
    text = {
        "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=START, video_token_id=92,
        vision_end_token_id=93, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return shaken(Qwen2VLForConditionalGeneration(config))


def picture(length: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A context `[1, 10]` with a picture of 2 x 3 places in it, and what the model is called with for all tokens."""
    context = torch.tensor([[5, START, *[IMAGE] * 6, 17, 23]])
    kinds = torch.nn.functional.pad((context == IMAGE).long(), (0, length - 10))
    pixels = torch.randn(24, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(3))
    return context, {
        "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 6]]), "mm_token_type_ids": kinds.int(),
    }  # fmt: skip


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_an_image_is_absorbed_at_the_positions_that_the_model_gives_it(tokens: str) -> None:
    model, query = qwen2_vl(), ids(1, 3, seed=2)
    context, given = picture(13)
    everything = torch.cat([context, query], 1)
    wanted = model(everything, **given).logits[:, -3:]
    counted = model(everything, position_ids=torch.arange(13)[None], **given).logits[:, -3:]
    assert apart(counted, wanted) > 100 * EXACT  # it does count by itself
    patch = absorb(model, context, query, tokens=tokens, context_inputs=given)
    assert patch.position_ids.shape == (3, 1, 3) and patch.position_ids[0, 0].tolist() == [7, 8, 9]
    with patch.applied(model):
        own = model(query, position_ids=patch.position_ids).logits
    served = slice(2, 3) if tokens == "last" else slice(0, 3)
    assert apart(own[:, served], wanted[:, served]) < EXACT


def test_positions_of_three_numbers_are_saved(tmp_path: Any) -> None:
    model, query = qwen2_vl(), ids(1, 3, seed=2)
    context, given = picture(13)
    patch = absorb(model, context, query, context_inputs=given)
    patch.save(tmp_path / "patch.safetensors")
    again = type(patch).load(tmp_path / "patch.safetensors")
    assert torch.equal(again.position_ids, patch.position_ids) and "positions 7 to 9" in again.validity


def test_text_alone_is_absorbed_by_the_same_model() -> None:
    model, context, query = qwen2_vl(), ids(1, 8), ids(1, 3, seed=2)
    wanted = model(torch.cat([context, query], 1)).logits[:, -1]
    patch = absorb(model, context, query)
    with patch.applied(model):
        assert apart(model(query, position_ids=patch.position_ids).logits[:, -1], wanted) < EXACT
