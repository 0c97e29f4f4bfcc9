"""KerasHub's causal language models, judged and patched where they are, on every Keras backend that is installed."""

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import keras_hub_checks as checks
import pytest
from processes import SMALL_MODELS, python

BACKENDS = ("jax", "tensorflow", "torch")
FAMILIES = tuple(checks.FAMILIES)
ONE_PROCESS = (
    *(f"family:{f}" for f in FAMILIES),
    "all_tokens:Mixtral", "sharing:Mistral", "editing:Llama3", "dtype:Llama3", "refusals:Llama3",
)  # fmt: skip
Result = dict[str, Any]
Measured = Callable[[str, str], Result]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """What a check measured on a backend; a backend's process is run when it is first asked for."""
    known: dict[str, Result] = {}
    folder = tmp_path_factory.mktemp("keras_hub")

    def run(backend: str) -> Result:
        command = ("-W", "ignore", checks.__file__, folder, *ONE_PROCESS)
        out = python(*command, home=folder, KERAS_BACKEND=backend, **SMALL_MODELS)
        found: Result = json.loads(out.splitlines()[-1])
        return found

    def get(backend: str, check: str) -> Result:
        for module in ("keras_hub", backend):
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} is not installed")
        if backend not in known:
            known[backend] = run(backend)
        result: Result = known[backend][check]
        assert "error" not in result, result["error"]
        return result

    return get


every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_backend
@every_family
def test_a_patched_model_gives_the_contextual_logits(backend: str, family: str, measured: Measured) -> None:
    """By its own ordinary run on the query, which starts at position 0; absorbing alone leaves it as it was."""
    found = measured(backend, f"family:{family}")
    print(f"\n{backend} {family}: unpatched {found['unpatched']:.3g}, patched {found['patched']:.3g}")
    assert found["patchable"]
    assert found["untouched"]
    assert found["unpatched"] > 1e-2
    assert found["patched"] <= 1e-5
    assert found["measured"] == pytest.approx(found["patched"], rel=0.01)
    assert found["positions"] == list(range(checks.QUERY))
    assert found["kinds"] == ["block_0"] * 5 + ["block_1"] if family == "Gemma3" else ["block_0"] * 2


@every_backend
@every_family
def test_generate_sees_the_edit_and_its_removal(backend: str, family: str, measured: Measured) -> None:
    """A `generate` that was compiled before; what is removed is removed to the last bit."""
    found = measured(backend, f"family:{family}")
    alone, behind_the_context, patched, after = found["spoken"]
    assert alone != behind_the_context
    assert patched == behind_the_context
    assert after == alone
    assert found["exact"] and found["restored"]


@every_backend
@every_family
def test_a_patch_names_the_models_own_variables(backend: str, family: str, measured: Measured) -> None:
    """The same on every backend and in every process, with those that are stored `[d_in, d_out]`."""
    found = measured(backend, f"family:{family}")
    output = {
        "Gemma3": "decoder_block_{}/ffw_linear/kernel",
        "Mixtral": "transformer_layer_{}/mixtral_sparse_moe_block/experts/expert_feedforward_output_dense",
    }.get(family, "transformer_layer_{}/feedforward_output_dense/kernel")
    layers = range(checks.FAMILIES[family].get("num_layers", checks.SIZES["num_layers"]))
    assert found["transposed"] == [output.format(layer) for layer in layers]
    norms = [f"decoder_block_{layer}/post_ffw_norm/scale" for layer in layers] if family == "Gemma3" else []
    assert sorted(found["changed"]) == sorted(found["transposed"] + norms)


@every_backend
def test_one_patch_from_a_file_serves_every_token(backend: str, measured: Measured) -> None:
    found = measured(backend, "all_tokens:Mixtral")
    assert found["unpatched"] > 1e-2
    assert found["patched"] <= 1e-5


@every_backend
def test_weights_are_shared(backend: str, measured: Measured) -> None:
    """What the user changes after the model was opened is seen by our run."""
    found = measured(backend, "sharing:Mistral")
    assert found["moved"] > 1e-2
    assert found["apart"] <= 1e-5
    assert found["variables"]


@every_backend
def test_patches_come_off_in_order_and_after_any_failure(backend: str, measured: Measured) -> None:
    found = measured(backend, "editing:Llama3")
    assert all(found[key] for key in ("between", "restored", "after_interrupt", "inside", "after_with"))
    said = found["messages"]
    assert "other weights" in said["twice"]
    assert "1 other patch(es) lie above it" in said["below"]
    assert "not on" in said["gone"]


@every_backend
def test_bfloat16(backend: str, measured: Measured) -> None:
    found = measured(backend, "dtype:Llama3")
    print(f"\n{backend}: unpatched {found['unpatched']:.3g}, patched {found['patched']:.3g}")
    assert found["dtypes"] == ["bfloat16"]
    assert found["exact"] and found["restored"]
    assert found["unpatched"] > 0.5 and found["patched"] <= 0.05


REFUSED = {
    "other_weights": "the patch was made for other weights",
    "other_family": "the patch was made for Llama3Backbone, this model (mistral_causal_lm",
    "other_shape": "has the shape (32, 48), llama3_causal_lm",
    "factored": "merge=True",
    "each": "tokens='each'",
    "flat": "[1, n]; got (12,)",
    "floats": "[1, n]; got (1, 12) float64",
    "empty": "the query is empty",
    "vocabulary": "must be from 0 to 60",
    "architecture": "transformer_layer_0: a TransformerDecoder has none of",
    "no_model": "Sequential is no KerasHub causal language model",
    "not_what_it_says": "the block transformer_layer_0 is not what its layers say",
    "quantised": "is quantised (int8)",
}


@every_backend
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_said(backend: str, case: str, measured: Measured) -> None:
    """With the place; and the model stays as it was."""
    found = measured(backend, "refusals:Llama3")
    assert REFUSED[case] in found["messages"][case]
    assert found["untouched"]
