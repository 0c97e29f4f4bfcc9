"""A patch on a live model does what it says, and taking it off leaves every byte as it was."""

from __future__ import annotations

import copy
import gc
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import Tensor, nn  # noqa: E402
from unchanged import hashes  # noqa: E402

from blockkit.backends.pytorch import absorb  # noqa: E402
from blockkit.backends.pytorch.editing import editor as editing  # noqa: E402
from blockkit.backends.pytorch.editing.editor import apply, remove, untie  # noqa: E402
from blockkit.backends.pytorch.editing.identity import fingerprint  # noqa: E402
from blockkit.backends.pytorch.watching.intercepted import Intercepted  # noqa: E402
from blockkit.errors import BadInput  # noqa: E402
from blockkit.graph.changes import MatrixChange, VectorChange, dense  # noqa: E402
from blockkit.patch.patch import Patch  # noqa: E402

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def llama(dtype: Any = torch.float32, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 31}
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes, **more)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype: Any = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_inner=24, vocab_size=31)
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


def gemma3(dtype: Any = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 31, "head_dim": 8}
    config = transformers.Gemma3TextConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)
    return transformers.Gemma3ForCausalLM(config).to(dtype).eval()


def mixtral(dtype: Any = torch.float32, experts: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 31}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    config = transformers.MixtralConfig(**sizes, **heads, experts_implementation=experts)
    return transformers.MixtralForCausalLM(config).to(dtype).eval()


ONE, TWO = "model.layers.0", "model.layers.1"
FAMILIES: dict[str, tuple[Any, dict[str, str]]] = {
    "llama": (llama, {f"{TWO}.mlp.down_proj.weight": "", f"{ONE}.post_attention_layernorm.weight": ""}),
    "gpt2": (
        gpt2,
        {"transformer.h.1.mlp.c_proj.weight": "transposed", "transformer.h.1.mlp.c_proj.bias": "",
         "transformer.h.0.ln_2.weight": "", "transformer.h.0.ln_2.bias": ""},
    ),
    "gemma3": (gemma3, {f"{TWO}.mlp.up_proj.weight": "", f"{TWO}.pre_feedforward_layernorm.weight": ""}),
    "mixtral": (mixtral, {f"{ONE}.mlp.experts.down_proj[1]": "", f"{ONE}.mlp.experts.down_proj[3]": ""}),
}  # fmt: skip


def shape_of(model: nn.Module, slot: str) -> tuple[int, ...]:
    name = slot.split("[")[0]
    shape = tuple(model.get_parameter(name).shape)
    return shape[1:] if "[" in slot else shape


def patch_for(model: nn.Module, slots: dict[str, str], rows: int = 0, size: float = 0.1, **more: Any) -> Patch:
    """Random changes; `rows` of them for each matrix or vector where they are per token."""
    rng = np.random.default_rng(1)
    changes: dict[str, Any] = {}
    for slot, how in slots.items():
        shape = shape_of(model, slot)
        draw = lambda *s: (size * rng.normal(size=s)).astype(np.float32)  # noqa: E731
        if len(shape) == 2:
            out, inner = reversed(shape) if how else shape
            changes[slot] = MatrixChange(draw(rows or 2, out), draw(rows or 2, inner) / size, per_token=bool(rows))
        else:
            changes[slot] = VectorChange(draw(rows, *shape) if rows else draw(*shape), per_token=bool(rows))
    facts: dict[str, Any] = {
        "made_for": fingerprint(model), "strategy": "test", "tokens": "each" if rows else "last",
        "context_length": 4, "query": tuple(IDS.flatten().tolist()), "dtype": "float32", "measured": {}, "batch": 2,
        "transposed": tuple(s for s, how in slots.items() if how),
    }  # fmt: skip
    return Patch(changes, **(facts | more))


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.double()


def edited(model: nn.Module, patch: Patch, row: int | None = None) -> nn.Module:
    """A copy that has the changes (of one row) as ordinary weights, by NumPy."""
    twin = copy.deepcopy(model)
    for slot, change in patch.changes.items():
        if row is not None:
            change = (
                MatrixChange(change.left[row : row + 1], change.right[row : row + 1])
                if isinstance(change, MatrixChange)
                else VectorChange(change.delta[row])
            )
        name, _, index = slot.rstrip("]").partition("[")
        whole = twin.get_parameter(name).data
        place = whole[int(index)] if index else whole
        turned = slot in patch.transposed
        value = dense(place.double().numpy().T if turned else place.double().numpy(), change)
        place.copy_(torch.as_tensor(value.T if turned else value))
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_gives_the_rounded_weights_and_comes_off_bit_for_bit(family: str, dtype: Any) -> None:
    build, slots = FAMILIES[family]
    model = build(dtype)
    before, plain = hashes(model), logits(model)
    patch = patch_for(model, slots)
    twin = edited(model, patch)
    receipt = patch.apply(model)
    assert receipt.exact and {p.name: p.how for p in receipt.parameters} == dict.fromkeys(slots, "merged")
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, its)
    assert torch.equal(logits(model), logits(twin)) and not torch.equal(logits(model), plain)
    patch.remove(model)
    assert hashes(model) == before and torch.equal(logits(model), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral, grouped"])
def test_factored_gives_what_merged_gives_and_touches_no_byte(family: str, dtype: Any) -> None:
    build, slots = FAMILIES[family.split(",")[0]]
    model = build(dtype, experts="grouped_mm") if "grouped" in family else build(dtype)
    before, plain, patch = hashes(model), logits(model), patch_for(model, slots)
    wanted = logits(edited(model, patch))
    with patch.applied(model, merge=False) as receipt:
        assert receipt.exact and all(p.how == "factored" for p in receipt.parameters)
        found = logits(model)
        assert {n: h for n, (_, h) in hashes(model).items()} == {n: h for n, (_, h) in before.items()}
    rounding = 1e-5 if dtype is torch.float32 else 0.05
    unit = torch.finfo(dtype).eps * wanted.abs().max()  # the logits themselves are rounded to this
    assert (found - wanted).abs().max() <= max(rounding * (wanted - plain).abs().max(), unit)
    assert (wanted - plain).abs().max() > 4 * unit
    assert hashes(model) == before and torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("llama", 10),
        ("llama", 2),
        ("gpt2", 10),
        ("gpt2", 2),
        ("gemma3", 10),
        ("gemma3", 2),
    ],
)
def test_values_for_each_token_or_each_prompt(family: str, rows: int) -> None:
    build, slots = FAMILIES[family]
    model = build()
    slots = {s: how for s, how in slots.items() if ".1." in s}  # the last block: a token sees its own values alone
    patch, plain = patch_for(model, slots, rows=rows), logits(model)
    with patch.applied(model, merge=False):
        found = logits(model).flatten(0, 1)
        with pytest.raises(BadInput, match=rf"{rows} rows.*this run has 3|2 prompt.s. of 5 token.s. .*run on .1, 3."):
            logits(model, IDS[:1, :3])
        if rows == 10 and family != "gpt2":  # whose rows are folded before the matrix is read
            with pytest.raises(BadInput, match=r"2 prompt\(s\) of 5 token\(s\).*run on \[1, 10\]"):
                logits(model, IDS.reshape(1, 10))
    for token in range(10):
        wanted = logits(edited(model, patch, row=token if rows == 10 else token // 5)).flatten(0, 1)[token]
        assert (found[token] - wanted).abs().max() <= 1e-5 * (wanted - plain.flatten(0, 1)[token]).abs().max() + 1e-7
    with pytest.raises(BadInput, match="merge=False"):
        apply(patch, model, True)


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def quantised() -> nn.Module:
    model = llama()
    layer = model.model.layers[1].mlp
    layer.down_proj.weight = nn.Parameter(torch.zeros(16, 24, dtype=torch.int8), requires_grad=False)
    return model


class Packed(Tensor):
    """What a quantisation library might put in a parameter's place."""


def packed() -> nn.Module:
    model = llama()
    layer = model.model.layers[1].mlp
    layer.down_proj._parameters["weight"] = layer.down_proj.weight.data.as_subclass(Packed)
    return model


def expanded() -> nn.Module:
    model = llama()
    layer = model.model.layers[1].mlp
    layer.down_proj.weight = nn.Parameter(torch.zeros(16, 1).expand(16, 24))
    return model


def inference() -> nn.Module:
    with torch.inference_mode():
        return llama()


DOWN = "model.layers.1.mlp.down_proj.weight"
REFUSED = {
    "no such parameter": (llama, "model.layers.1.mlp.down_prj.weight", r"no parameter .*down_prj.*down_proj"),
    "no such slice": (mixtral, "model.layers.0.mlp.experts.down_proj[4]", r"no slice 4"),
    "buffer": (llama, "model.rotary_emb.inv_freq", "is a buffer"),
    "tied": (tied, "lm_head.weight", r"lm_head.weight and model.embed_tokens.weight are tied.*untie"),
    "meta": (lambda: llama().to("meta"), DOWN, "meta device"),
    "quantised": (quantised, DOWN, "int8"),
    "subclass": (packed, DOWN, "Packed"),
    "expanded": (expanded, DOWN, "stands for several"),
    "inference": (inference, DOWN, "read-only"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name_before_anything_changes(kind: str) -> None:
    build, slot, why = REFUSED[kind]
    model = build()
    good = llama() if build is not mixtral else mixtral()
    first = "model.layers.0.mlp.up_proj.weight" if build is not mixtral else "model.layers.0.mlp.gate.weight"
    patch = patch_for(good, {first: ""})
    shape = (16, 24) if slot != "lm_head.weight" else (31, 16)
    change = MatrixChange(*(np.ones((1, n), np.float32) for n in shape))
    patch = replace(patch, changes={**patch.changes, slot: change})
    if kind in ("inference",):
        patch = replace(patch, made_for=fingerprint(model))
    before = hashes(model) if kind != "meta" else None
    with pytest.raises(BadInput, match=why):
        patch.apply(model)
    assert before is None or hashes(model) == before
    with pytest.raises(BadInput, match="is not on this"):
        patch.remove(model)


def test_another_shape_orientation_class_or_dtype_is_refused() -> None:
    model = llama()
    patch = patch_for(model, {DOWN: ""})
    turned = replace(patch, transposed=(DOWN,))
    with pytest.raises(BadInput, match=r"\[24, 16\] \(stored \[d_in, d_out\]\), this model's has the shape \[16, 24\]"):
        turned.apply(model)
    with pytest.raises(BadInput, match="class, or a name, shape or dtype"):
        patch.apply(llama(torch.bfloat16))


def test_untied_it_can_be_patched_and_saved(tmp_path: Any) -> None:
    model = tied()
    untie(model, "lm_head.weight")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    patch = patch_for(model, {"lm_head.weight": ""})
    with patch.applied(model):
        wanted = logits(model)
        model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), wanted)
    with pytest.raises(BadInput, match="shares its memory with no other"):
        untie(model, "lm_head.weight")


@pytest.mark.parametrize("merge", [True, False])
def test_patches_come_off_in_reverse_order_only(merge: bool) -> None:
    model = llama()
    before = hashes(model)
    first = patch_for(model, {DOWN: ""}, source="first.bk")
    other = patch_for(model, {DOWN: "", "model.norm.weight": ""}, source="other.bk")
    apply(first, model, merge)
    with pytest.raises(BadInput, match="already"):
        apply(first, model, merge)
    with pytest.raises(BadInput, match=r"other values.*first\.bk.*remove that one first"):
        apply(other, model, merge)
    second = patch_for(model, {DOWN: ""}, source="second.bk", query=(1, 2, 3, 4))
    apply(second, model, merge)
    both = edited(edited(llama(), first), second)
    assert torch.allclose(logits(model), logits(both), atol=1e-5)
    with pytest.raises(BadInput, match=r"first\.bk lies under others.*remove first the patch second\.bk"):
        remove(first, model)
    remove(replace(second), model)  # an equal patch, as one that was saved and loaded
    remove(first, model)
    assert hashes(model) == before
    with pytest.raises(BadInput, match="is not on this"):
        remove(first, model)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_applied_restores_the_model(merge: bool, error: type[BaseException]) -> None:
    model = gpt2()
    before = hashes(model)
    patch = patch_for(model, FAMILIES["gpt2"][1])
    with pytest.raises(error), patch.applied(model, merge=merge):
        logits(model)
        raise error
    assert hashes(model) == before


@pytest.mark.parametrize("fails_at", [1, 2, 4])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failing_in_the_middle_leaves_no_trace(
    fails_at: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gpt2()
    before, patch, calls, put = hashes(model), patch_for(model, FAMILIES["gpt2"][1]), [], editing._put

    def failing(place: Tensor, value: Tensor) -> None:
        calls.append(place)
        if len(calls) != fails_at:
            put(place, value)
        else:
            raise error

    monkeypatch.setattr(editing, "_put", failing)
    with pytest.raises(error):
        patch.apply(model)
    assert hashes(model) == before
    patch.apply(model)
    patch.remove(model)
    assert hashes(model) == before


def test_a_change_that_overflows_is_refused_and_undone() -> None:
    model = llama(torch.float16)
    before = hashes(model)
    patch = patch_for(model, {"model.norm.weight": "", DOWN: ""}, size=1e6)
    with pytest.raises(BadInput, match=r"model\.norm\.weight.*overflows"):
        patch.apply(model)
    assert hashes(model) == before


def test_weights_that_were_cast_meanwhile_are_not_restored_silently() -> None:
    model = llama()
    patch = patch_for(model, {DOWN: ""})
    patch.apply(model)
    model.bfloat16()
    with pytest.raises(BadInput, match=r"float32 on cpu when the patch was put on, .* bring it back \(.to\)"):
        patch.remove(model)


def test_memory_that_is_read_only_is_not_written_into(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    np.save(tmp_path / "weight.npy", model[0].weight.detach().numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of just this
        model[0].weight.data = torch.from_numpy(np.load(tmp_path / "weight.npy", mmap_mode="r"))
    before, patch = hashes(model), patch_for(model, {"0.weight": ""})
    with patch.applied(model, merge=True):
        assert hashes(model) != before
    assert hashes(model) == before


@pytest.mark.parametrize("merge", [False, True])
def test_a_copy_made_meanwhile_is_patched_and_can_be_freed(merge: bool) -> None:
    model = llama()
    patch = patch_for(model, FAMILIES["llama"][1])
    before, plain = hashes(model), model(IDS).logits
    with patch.applied(model, merge=merge):
        copied, wanted = copy.deepcopy(model), model(IDS).logits
    assert torch.equal(copied(IDS).logits, wanted) and hashes(model) == before
    if not merge:
        patch.remove(copied)
        assert torch.equal(copied(IDS).logits, plain)
        assert [h for _, h in hashes(copied).values()] == [h for _, h in before.values()]


class Interrupted(dict[str, Any]):
    """A table of parameters in which the first change is broken off."""

    armed = False

    def __setitem__(self, name: str, value: Any) -> None:
        if self.armed:
            self.armed = False
            raise KeyboardInterrupt
        super().__setitem__(name, value)


def test_a_removal_that_was_broken_off_can_be_made_again() -> None:
    model = llama()
    before, patch = hashes(model), patch_for(model, FAMILIES["llama"][1])
    table = model.model.layers[1].mlp.down_proj
    table.__dict__["_parameters"] = held = Interrupted(table._parameters)
    patch.apply(model, merge=False)
    held.armed = True
    with pytest.raises(KeyboardInterrupt):
        patch.remove(model)
    patch.remove(model)
    assert hashes(model) == before
    assert not any(isinstance(p, Intercepted) for p in model.parameters())


def test_what_an_error_leaves_on_the_model_is_said() -> None:
    model = llama()
    patch = patch_for(model, {DOWN: ""})
    with pytest.raises(ZeroDivisionError) as caught, patch.applied(model, merge=True):
        model.half()
        raise ZeroDivisionError
    assert "the patch is still on the model" in caught.value.__notes__[0]
    model.float()
    patch.remove(model)


def test_a_patched_parameter_is_copied_and_stepped_as_what_it_is() -> None:
    model, other = llama(), llama()
    before, patch = hashes(model), patch_for(model, {DOWN: ""})
    with patch.applied(model, merge=False):
        other.load_state_dict(model.state_dict())
        weight = model.get_parameter(DOWN)
        with torch.no_grad():
            other.get_parameter(DOWN).copy_(weight)
            other.get_parameter(DOWN).lerp_(weight, 0.5)
            torch._foreach_mul_([weight], 1.0)
    assert hashes(model) == before and torch.equal(other.get_parameter(DOWN), model.get_parameter(DOWN))


@pytest.mark.parametrize(("batch", "tokens", "ran"), [(2, "last", [1, 2]), (1, "each", [3, 2])])
def test_rows_are_not_mistaken_for_one_another(batch: int, tokens: str, ran: list[int]) -> None:
    model, rows = llama(), torch.arange(12)[None]
    query = torch.arange(3, 3 + 3 * batch).reshape(batch, 3)
    patch = absorb(model, rows.repeat(batch, 1), query, tokens=tokens)
    with patch.applied(model), pytest.raises(BadInput, match=r"and the model was run on"):
        model(torch.arange(ran[0] * ran[1]).reshape(ran))


@pytest.mark.parametrize("merge", [False, True])
def test_nothing_is_left_in_the_state_dict_or_in_memory(merge: bool) -> None:
    model = llama()
    keys = list(model.state_dict())
    patch = patch_for(model, FAMILIES["llama"][1])
    patch.apply(model, merge=merge)
    assert list(model.state_dict()) == keys
    model_count = len(editing._APPLIED)
    del model
    gc.collect()
    assert len(editing._APPLIED) < model_count


def test_receipt_measures_the_change() -> None:
    model = llama()
    patch = patch_for(model, {DOWN: "", "model.norm.weight": ""})
    with patch.applied(model) as receipt:
        matrix, vector = receipt.parameters
    change = patch.changes[DOWN].left.astype(float).T @ patch.changes[DOWN].right.astype(float)
    assert np.allclose((matrix.largest, matrix.norm), (np.abs(change).max(), np.linalg.norm(change)))
    delta = patch.changes["model.norm.weight"].delta
    assert np.allclose((vector.largest, vector.norm), (np.abs(delta).max(), np.linalg.norm(delta)))
    assert (matrix.shape, matrix.dtype) == ((16, 24), "float32")
