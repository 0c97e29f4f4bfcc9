"""Contexts absorbed into models in memory, each proved by an ordinary call of the user's own model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_models import (
    EXACT,
    SIZES,
    VISION,
    apart,
    digest,
    gemma,
    gpt2,
    ids,
    llama,
    mamba,
    mixtral,
    opt,
    positions,
    shaken,
)
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from blockkit import BadInput, NotPatchable
from blockkit.backends.pytorch import Patch, absorb


@pytest.mark.parametrize("strategy", [None, "matrix"])
@pytest.mark.parametrize("tokens", ["last", "each", "all"])
@pytest.mark.parametrize("make", [llama, gemma, gpt2, mixtral, mamba])
def test_the_edited_model_gives_the_contextual_logits(make: Any, tokens: str, strategy: str | None) -> None:
    model, context, query = make(), ids(1, 12), ids(1, 3, seed=2)
    before, wanted = digest(model), model(torch.cat([context, query], 1)).logits[:, -3:]
    served = slice(2, 3) if tokens == "last" else slice(0, 3)
    for merge in (False, True) if tokens != "each" else (False,):
        patch = absorb(model, context, query, tokens=tokens, strategy=strategy, merge=merge)
        unpatched = model(query, **positions(model, patch)).logits
        with patch.applied(model):
            own = model(query, **positions(model, patch)).logits
        assert apart(own[:, served], wanted[:, served]) < EXACT < 0.1 < apart(unpatched[:, served], wanted[:, served])
        assert patch.measured["linf"] < EXACT and digest(model) == before


def test_positions_that_a_model_does_not_take_are_made_up_for_by_the_first_block() -> None:
    model, context, query = opt(), ids(1, 12), ids(1, 3, seed=2)
    wanted = model(torch.cat([context, query], 1)).logits[:, -1]
    patch = absorb(model, context, query)
    with patch.applied(model):
        own = model(query, **positions(model, patch)).logits[:, -1]
    assert apart(own, wanted) < EXACT


@pytest.mark.parametrize("tokens", ["last", "each", "all"])
def test_retained_context_runs_through_the_edited_weights(tokens: str) -> None:
    model, context, query = llama(), ids(1, 12), ids(1, 3, seed=2)
    wanted = model(torch.cat([context, query], 1)).logits[:, -3:]
    patch = absorb(model, context, query, retain=[0, 1, 7], tokens=tokens)
    assert patch.position_ids.tolist() == [[0, 1, 7, 12, 13, 14]]
    with patch.applied(model):
        own = model(torch.cat([context[:, [0, 1, 7]], query], 1), position_ids=patch.position_ids).logits[:, -3:]
    served = slice(2, 3) if tokens == "last" else slice(0, 3)
    assert apart(own[:, served], wanted[:, served]) < EXACT


@pytest.mark.parametrize("make", [llama, gemma, gpt2])
def test_embeddings_stand_for_ids(make: Any, tmp_path: Any) -> None:
    model, context, query = make(), ids(1, 12), ids(1, 3, seed=2)
    embed = model.get_input_embeddings()
    wanted = model(torch.cat([context, query], 1)).logits[:, -3:]
    patch = absorb(model, embed(context), query, tokens="all")
    with patch.applied(model):
        assert apart(model(query, position_ids=patch.position_ids).logits, wanted) < EXACT
    both = absorb(model, embed(context), embed(query))
    with both.applied(model):
        own = model(inputs_embeds=embed(query), position_ids=both.position_ids).logits[:, -1]
        assert apart(own, wanted[:, -1]) < EXACT
    both.save(tmp_path / "patch.safetensors")
    again = Patch.load(tmp_path / "patch.safetensors")
    with again.applied(model):
        assert torch.equal(model(inputs_embeds=embed(query), position_ids=both.position_ids).logits[:, -1], own)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("make", [llama, gemma, gpt2])
def test_prompts_of_different_lengths_are_absorbed_together(make: Any, padded: bool) -> None:
    model, context, query = make(), ids(3, 10), ids(3, 4, seed=2)
    query[:, 0] = torch.tensor([11, 12, 13])
    masks = torch.ones(3, 10, dtype=torch.long), torch.ones(3, 4, dtype=torch.long)
    masks[0][1, :4], masks[0][2, :7] = 0, 0
    if padded:
        masks[1][0, :2] = 0
    whole = torch.cat(masks, 1)
    places = (whole.cumsum(1) - 1).clamp(min=0)
    both = torch.cat([context, query], 1)
    wanted = model(both, attention_mask=whole, position_ids=places).logits[:, -4:]
    for tokens in ("last", "each", "all"):
        patch = absorb(model, context, query, context_mask=masks[0], query_mask=masks[1], tokens=tokens)
        with patch.applied(model):
            own = model(query, attention_mask=masks[1], position_ids=patch.position_ids).logits
        served = masks[1].bool() if tokens != "last" else torch.eye(4)[3].bool().expand(3, 4)
        assert apart(own[served], wanted[served]) < EXACT


@pytest.mark.parametrize("tokens", ["last", "each", "all"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_what_an_encoder_reads_is_absorbed_into_the_decoder(kind: str, tokens: str) -> None:
    config: Any = T5Config(vocab_size=120, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    made: Any = T5ForConditionalGeneration
    if kind == "bart":
        config = BartConfig(
            vocab_size=120, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
            forced_eos_token_id=None, bos_token_id=0, eos_token_id=2, pad_token_id=1,
        )  # fmt: skip
        made = BartForConditionalGeneration
    model, context, kept, decoder = shaken(made(config)), ids(1, 12), ids(1, 3, seed=2), ids(1, 4, seed=3)
    wanted = model(input_ids=torch.cat([context, kept], 1), decoder_input_ids=decoder).logits
    patch = absorb(model, context, kept, decoder_input_ids=decoder, tokens=tokens)
    served = slice(3, 4) if tokens == "last" else slice(0, 4)
    unpatched = model(input_ids=kept, decoder_input_ids=decoder).logits
    with patch.applied(model):
        own = model(input_ids=kept, decoder_input_ids=decoder).logits
    assert apart(own[:, served], wanted[:, served]) < EXACT < 0.1 < apart(unpatched[:, served], wanted[:, served])


def seeing_gemma() -> nn.Module:
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**SIZES), vision_config=SiglipVisionConfig(**VISION), mm_tokens_per_image=4,
        image_token_index=100, boi_token_index=101, eoi_token_index=102, image_token_id=100,
    )  # fmt: skip
    return shaken(Gemma3ForConditionalGeneration(config))


def seeing_llama() -> nn.Module:
    config = LlavaConfig(
        text_config=LlamaConfig(**SIZES), vision_config=CLIPVisionConfig(**VISION), image_token_id=100,
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=4,
    )  # fmt: skip
    return shaken(LlavaForConditionalGeneration(config))


def pali_gemma() -> nn.Module:
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**SIZES), vision_config=SiglipVisionConfig(**VISION, projection_dim=32),
        image_token_id=100, projection_dim=32, hidden_size=32,
    )  # fmt: skip
    return shaken(PaliGemmaForConditionalGeneration(config))


@pytest.mark.parametrize("tokens", ["last", "all"])
@pytest.mark.parametrize("make", [seeing_gemma, seeing_llama, pali_gemma])
def test_an_image_is_absorbed(make: Any, tokens: str) -> None:
    model = make()
    context, query = torch.tensor([[5, 6, 100, 100, 100, 100, 7, 8, 9]]), torch.tensor([[11, 12, 13]])
    both = torch.cat([context, query], 1)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    seen: dict[str, Any] = {"pixel_values": pixels}
    if make is not seeing_llama:
        seen["token_type_ids"] = (both == 100).long()
    wanted = model(input_ids=both, **seen).logits[:, -3:]
    assert apart(model(input_ids=both, **{**seen, "pixel_values": -pixels}).logits[:, -3:], wanted) > 0.1
    patch = absorb(model, context, query, tokens=tokens, context_inputs=seen)
    with patch.applied(model):
        own = model(input_ids=query, position_ids=patch.position_ids).logits
    served = slice(2, 3) if tokens == "last" else slice(0, 3)
    assert apart(own[:, served], wanted[:, served]) < EXACT


class Reader(nn.Module):
    """A decoder that also looks at a memory, of which it needs one at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(16, 2, 24, batch_first=True) for _ in range(2))

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
        x, mask = self.embed(ids), nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        for layer in self.layers:
            x = layer(x, memory, tgt_mask=mask, tgt_is_causal=True)
        return self.head(x)


@pytest.mark.parametrize("batch", [1, 2])
def test_what_both_runs_are_called_with(batch: int) -> None:
    model, context, query = shaken(Reader()), ids(batch, 12) % 50, ids(batch, 3, seed=2) % 50
    memory = torch.randn(batch, 5, 16, generator=torch.Generator().manual_seed(3))
    wanted = model(torch.cat([context, query], 1), memory)[:, -1]
    patch = absorb(model, context, query, inputs={"memory": memory})
    with patch.applied(model):
        assert apart(model(query, memory)[:, -1], wanted) < EXACT
    assert apart(model(query, memory)[:, -1], wanted) > 0.1


def test_a_patch_of_a_model_in_float64_is_no_less_exact(tmp_path: Any) -> None:
    model, context, query = gpt2().double(), ids(1, 12), ids(1, 3, seed=2)
    wanted = model(torch.cat([context, query], 1)).logits
    absorb(model, context, query, tokens="all").save(tmp_path / "patch.safetensors")
    patch = Patch.load(tmp_path / "patch.safetensors")
    for merge in (False, True):
        with patch.applied(model, merge=merge):
            assert apart(model(query, position_ids=patch.position_ids).logits, wanted[:, -3:]) < 1e-13


def test_many_tokens_merged_are_as_exact_as_a_plain_run() -> None:
    """They read nearly the same, so the factors are large: what rounding them leaves has to be made up for."""
    model, draws = llama(), torch.Generator().manual_seed(5)
    query = torch.randn(1, 1, 32, generator=draws) + 1e-4 * torch.randn(1, 12, 32, generator=draws)
    context = torch.randn(1, 12, 32, generator=draws)
    both = torch.cat([context, query], 1)
    wanted = model(inputs_embeds=both).logits[:, -12:]
    floor = apart(model.double()(inputs_embeds=both.double()).logits[:, -12:].float(), wanted)
    patch = absorb(model.float(), context, query, tokens="all", merge=True)
    with patch.applied(model):
        own = model(inputs_embeds=query, position_ids=patch.position_ids).logits
    assert apart(own, wanted) < 10 * floor


def test_a_patch_made_anew_from_its_file_serves_the_same_model(tmp_path: Any) -> None:
    model, context, query = gemma(), ids(1, 12), ids(1, 3, seed=2)
    wanted = model(torch.cat([context, query], 1)).logits[:, -1]
    absorb(model, context, query, strategy="matrix").save(tmp_path / "patch.safetensors")
    patch = Patch.load(tmp_path / "patch.safetensors")
    with patch.applied(model):
        assert apart(model(query, position_ids=patch.position_ids).logits[:, -1], wanted) < EXACT
    with pytest.raises(BadInput, match="device='nowhere' cannot be used"):
        Patch.load(tmp_path / "patch.safetensors", device="nowhere")


def test_a_saved_model_holds_the_merged_patch(tmp_path: Any) -> None:
    model, context, query = llama(), ids(1, 12), ids(1, 3, seed=2)
    wanted = model(torch.cat([context, query], 1)).logits[:, -1]
    patch = absorb(model, context, query, merge=True)
    with patch.applied(model):
        model.save_pretrained(tmp_path / "edited")  # type: ignore[operator]
    again = LlamaForCausalLM.from_pretrained(tmp_path / "edited").eval()
    with torch.no_grad():
        assert apart(again(query, position_ids=patch.position_ids).logits[:, -1], wanted) < EXACT


def test_frozen_parameters_stay_and_what_is_left_is_used() -> None:
    model, context, query = llama(), ids(1, 12), ids(1, 3, seed=2)
    assert {n.rsplit(".", 2)[-2] for n in absorb(model, context, query, freeze=["mlp.*"]).changes} == {"o_proj"}
    with pytest.raises(NotPatchable, match=r"model\.layers\.0"):
        absorb(model, context, query, freeze=["mlp.*", "self_attn.*"], strategy="matrix")
