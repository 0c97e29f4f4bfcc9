"""A sample of the zoo: classes of different structure, each patched as its table says (`make zoo` does them all)."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="PyTorch is needed to run the models")
pytest.importorskip("transformers", reason="transformers is needed for its classes")
import zoo_models
from zoo_runs import LEAST, WORST, Patched, Row, exact, examined

SAMPLE = {
    "GPT2LMHeadModel": "biases, matrices stored [d_in, d_out]",
    "BertLMHeadModel": "norms behind the residual sums",
    "BloomForCausalLM": "positions as a bias of the attention, none from outside",
    "FalconForCausalLM": "attention and MLP in parallel, behind one norm",
    "Gemma3ForCausalLM": "norms behind both mixers, windows",
    "MixtralForCausalLM": "experts",
    "DeepseekV3ForCausalLM": "latent attention, dense and expert layers, shared experts",
    "MambaForCausalLM": "a state-space scan, no positions",
    "FalconH1ForCausalLM": "a scan and attention in one block",
    "Qwen3NextForCausalLM": "gated delta rule and gated attention, experts with a gated shared one",
    "BartForCausalLM": "a decoder without its encoder",
    "xLSTMForCausalLM": "recurrent memory",
}


@pytest.fixture(scope="module", params=SAMPLE)
def row(request: pytest.FixtureRequest) -> Row:
    return examined(request.param)


def test_a_class_is_patched_to_its_own_floor(row: Row) -> None:
    assert row.facts is not None, row.reason
    assert row.blocks, row.reason
    for patch in row.patches:
        assert not patch.reason, f"{patch.strategy}: {patch.reason}"
        assert exact(patch, row.facts.floor), (patch, row.facts.floor)
    assert row.patched and len(row.patches) == 2


def test_the_rule_refuses_what_it_should() -> None:
    floor = 1e-6
    good, bad = WORST * floor, 1.01 * WORST * floor
    assert exact(Patched(None, error=good, merged=good, unpatched=LEAST * floor), floor)
    assert not exact(Patched(None, error=bad, merged=good, unpatched=1.0), floor)
    assert not exact(Patched(None, error=good, merged=bad, unpatched=1.0), floor)
    assert not exact(Patched(None, error=0.0, merged=0.0, unpatched=0.99 * LEAST * floor), floor)
    assert not exact(Patched(None, reason="no route"), floor)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MambaForCausalLM", "DeepseekV2ForCausalLM"])
def test_models_are_random_everywhere_and_the_same_each_time(name: str) -> None:
    first, second = (dict(zoo_models.build(name).named_parameters()) for _ in range(2))
    assert all((first[n] == second[n]).all() for n in first)
    assert not [n for n, p in first.items() if p.numel() > 1 and float(p.detach().std()) == 0]


def test_a_class_that_cannot_be_built_is_a_row_with_a_reason() -> None:
    row = examined("NoSuchForCausalLM")
    assert row.reason.startswith("not built: AttributeError") and not row.patched
