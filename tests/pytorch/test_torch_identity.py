"""Which model in memory a patch is for: every value that a run reads, and what is claimed where one differs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from blockkit import Patch  # noqa: E402
from blockkit.backends.pytorch import absorb  # noqa: E402
from blockkit.backends.pytorch.editing import identity  # noqa: E402
from blockkit.errors import BadInput  # noqa: E402

CONTEXT, QUERY = torch.arange(3, 11)[None], torch.arange(11, 15)[None]


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=24, vocab_size=31, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def exchanged(model: Any) -> None:
    """Exchanges two rows that sums over words, modulo the numbers of the first format, do not tell apart."""
    rows = model.model.layers[1].mlp.up_proj.weight.data
    rows[[0, 5]] = rows[[5, 0]].clone()


OTHERS: dict[str, Callable[[Any], Any]] = {
    "one number of the embedding": lambda m: m.model.embed_tokens.weight.data[7, 3].add_(1e-3),
    "a row of the embedding, by an optimiser's hand": lambda m: torch.no_grad()(m.model.embed_tokens.weight[7].add_)(1),
    "another fine-tune": lambda m: [p.data.mul_(1.001) for p in m.model.layers[0].parameters()],
    "two rows exchanged": exchanged,
    "the head": lambda m: m.lm_head.weight.data.neg_(),
    "the final norm": lambda m: setattr(m.model.norm.weight, "data", m.model.norm.weight.data + 1),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(1.5),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("how", ["a copy", "itself"])
def test_a_model_of_other_values_is_refused(what: str, how: str) -> None:
    model = llama()
    patch = absorb(model, CONTEXT, QUERY)
    other = copy.deepcopy(model) if how == "a copy" else model
    OTHERS[what](other)
    with pytest.raises(BadInput, match=r"made for other values of the parameters or buffers.*allow_other_weights"):
        patch.apply(other)
    with patch.applied(other, allow_other_weights=True) as receipt:
        assert not receipt.exact and receipt.validity.startswith("not proved on these weights")


def test_the_same_values_in_another_model_are_taken(tmp_path: Any) -> None:
    patch = absorb(llama(), CONTEXT, QUERY)
    patch.save(tmp_path / "p")
    for found in (patch, Patch.load(tmp_path / "p")):
        with found.applied(llama()) as receipt:
            assert receipt.exact and receipt.validity.startswith("exact for")
        with found.applied(llama(), allow_other_weights=True) as receipt:
            assert receipt.exact  # they are none, after all


def test_a_part_of_a_patch_is_checked_and_claims_nothing() -> None:
    model = llama()
    patch = absorb(model, CONTEXT, QUERY)
    first = next(iter(patch.changes))
    part = replace(patch, changes={first: patch.changes[first]})
    with part.applied(model) as receipt:
        assert not receipt.exact and receipt.validity.startswith("not proved: other changes were measured")
    model.lm_head.weight.data.neg_()
    with pytest.raises(BadInput, match="other values"):
        part.apply(model)


def test_another_adapter_that_is_active_is_another_model() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(), settings, "one").eval()
    model.add_adapter("two", settings)
    before = identity.fingerprint(model)
    model.set_adapter("two")
    assert identity.fingerprint(model)["digest"] != before["digest"]
    with model.disable_adapter():
        assert identity.fingerprint(model)["digest"] != before["digest"]
    model.set_adapter("one")
    assert identity.fingerprint(model) == before


def test_a_patch_lying_beside_the_weights_is_seen() -> None:
    model = llama()
    one, two = absorb(model, CONTEXT, QUERY), absorb(model, CONTEXT + 1, QUERY)
    with one.applied(model, merge=False), pytest.raises(BadInput, match=r"lies on it.*remove that one first"):
        two.apply(model)
    with two.applied(model) as receipt:
        assert receipt.exact


def test_what_is_known_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    leaf = identity._leaf
    monkeypatch.setattr(identity, "_leaf", lambda name, tensor: hashed.append(name) or leaf(name, tensor))
    model = llama()
    patch = absorb(model, CONTEXT, QUERY)
    patch.apply(model)
    patch.remove(model)
    hashed.clear()
    for _ in range(3):
        patch.apply(model)
        patch.remove(model)
    assert not hashed
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(BadInput):
        patch.apply(model)
    assert hashed == ["parameter lm_head.weight"]


def test_looking_at_a_large_model_again_costs_little() -> None:
    model = nn.ModuleList(nn.Linear(2048, 2048) for _ in range(16))
    start = time.perf_counter()
    first = identity.fingerprint(model)
    middle = time.perf_counter()
    assert identity.fingerprint(model) == first
    assert time.perf_counter() - middle < (middle - start) / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_number_and_shape_counts(dtype: Any) -> None:
    def fingerprint(value: torch.Tensor) -> str:
        model = nn.Module()
        model.weight = nn.Parameter(value)
        return identity.fingerprint(model)["digest"]

    plain = torch.arange(24, dtype=dtype).reshape(4, 6)
    others = [plain.reshape(6, 4), plain.flip(0), plain.t(), torch.full_like(plain, 0.0), plain[:3]]
    others += [plain + (torch.arange(24).reshape(4, 6) == i) for i in range(24)]
    found = {fingerprint(v.clone().to(dtype)) for v in [plain, *others]}
    assert len(found) == len(others) + 1
    assert fingerprint(plain.t().contiguous().t()) == fingerprint(plain)  # however it lies in memory
