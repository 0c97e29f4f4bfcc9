"""Checkpoints of Hugging Face models: the same logits as their own classes in float64, or a refusal by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
from checkpoints import insist_that_slots_cover
from families import GEMMA, GPT2, LLAMA, VOCABULARY, Pair
from safetensors.numpy import load_file, save_file

from blockkit.absorbing.executor import Executor, reference
from blockkit.absorbing.run import fill_cache, logits_of, run_stream
from blockkit.checkpoint.configuration import supported
from blockkit.checkpoint.folder import open_folder, write_folder
from blockkit.checkpoint.model import architecture_from_config, open_model
from blockkit.errors import BadInput

LIMIT = 1e-10  # largest difference of two logits in float64; they are of order 1
TOKENS, OFFSET = 12, 17

FULL_LINEAR = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip
MIXED_LAYERS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]

# name -> (family, changed settings)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3", {}),
    "gemma3-scale-dim": ("gemma3", {"query_pre_attn_scalar": 14}),
    "gemma3-one-kv-head": ("gemma3", {"num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3-linear-rope": ("gemma3", {"query_pre_attn_scalar": 14, "rope_parameters": FULL_LINEAR}),
    "gemma3-layer-types": ("gemma3", {"num_hidden_layers": 4, "layer_types": MIXED_LAYERS}),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "llama-3": ("llama", {"rope_parameters": {"rope_theta": 500.0, **LLAMA3}}),
    "llama-head-dim": ("llama", {"head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "gpt2": ("gpt2", {}),
    "gpt2-inner": ("gpt2", {"n_inner": 40, "layer_norm_epsilon": 1e-3, "activation_function": "gelu_pytorch_tanh"}),
}


FAMILIES = {"gemma3": ("gemma3_text", GEMMA), "llama": ("llama", LLAMA), "gpt2": ("gpt2", GPT2)}


def make(path: Path, family: str, changed: dict[str, Any]) -> Pair:
    model_type, settings = FAMILIES[family]
    return families.make(path, model_type, {**settings, **changed})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Every case's model, made once."""
    made: dict[str, Pair] = {}

    def get(case: str) -> Pair:
        if case not in made:
            made[case] = make(tmp_path_factory.mktemp(case), *CASES[case])
        return made[case]

    return get


def some_ids(count: int = TOKENS) -> np.ndarray:
    return families.some_ids(count)


def ours(path: Path, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return run(reference(open_model(path), "float64"), ids, positions)


def run(executor: Executor, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return logits_of(executor, run_stream(executor, ids, positions))


def apart(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape == (a.shape[0], VOCABULARY) and a.dtype == b.dtype == np.float64
    assert np.abs(b).max() > 0.3, "logits near zero would be equal whatever the model does"
    return float(np.abs(a - b).max())


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("start", [0, OFFSET])
@pytest.mark.parametrize("case", CASES)
def test_same_logits(case: str, start: int, pairs: Callable[[str], Pair]) -> None:
    pair, ids, positions = pairs(case), some_ids(), np.arange(start, start + TOKENS)
    difference = apart(ours(pair.path, ids, positions), pair.logits(ids, positions))
    print(f"\n{case} from position {start}: {difference:.3g}")
    assert difference <= LIMIT


@pytest.mark.parametrize("case", ["gemma3-linear-rope", "gemma3", "llama", "llama-head-dim", "gpt2"])
def test_same_logits_at_positions_with_gaps(case: str, tmp_path: Path) -> None:
    """Rotary attention is blind to a common offset, so gaps are what shows that positions are used.

    The Hugging Face classes count a window in rows and not in positions; it is made wide enough to agree.
    """
    family, changed = CASES[case]
    pair = make(tmp_path, family, {**changed, **({"sliding_window": 64} if family == "gemma3" else {})})
    ids, positions = some_ids(), np.cumsum([3, 1, 1, 7, 1, 2, 1, 1, 9, 4, 1, 1])
    assert apart(ours(pair.path, ids, positions), pair.logits(ids, positions)) <= LIMIT
    assert apart(ours(pair.path, ids, np.arange(TOKENS)), pair.logits(ids, positions)) > 1e-4


@pytest.mark.parametrize("case", ["gemma3-linear-rope", "llama", "gpt2"])
def test_a_cache_changes_nothing(case: str, pairs: Callable[[str], Pair]) -> None:
    """The tokens behind a cache see the earlier ones, through both kinds of layer."""
    pair, ids, positions, first = pairs(case), some_ids(), np.arange(TOKENS), 8
    executor = reference(open_model(pair.path), "float64")
    cache = fill_cache(executor, ids[:first], positions[:first])
    cached = logits_of(executor, run_stream(executor, ids[first:], positions[first:], cache=cache))
    assert apart(cached, pair.logits(ids, positions)[first:]) <= LIMIT


def test_the_cases_hold_what_they_are_for(pairs: Callable[[str], Pair]) -> None:
    """Both kinds of layer, a window shorter than the sequence, grouped heads, norms that are not trivial."""
    model = open_model(pairs("gemma3-linear-rope").path)
    kinds = [model.architecture.kind_at(layer) for layer in range(model.architecture.depth or 0)]
    assert kinds == ["local"] * 5 + ["global", "local"]
    assert model.architecture.constants["window"] < TOKENS
    assert model.architecture.constants["rope_scaling"] == 8.0
    assert model.architecture.constants["heads"] > model.architecture.constants["kv_heads"] > 1
    assert np.ptp(model.parameter("layers.5.attention.q_norm")) > 0.1
    assert [open_model(pairs(c).path).architecture.tied for c in ("llama", "llama-tied")] == [False, True]
    mixed = open_model(pairs("gemma3-layer-types").path).architecture
    assert [mixed.kind_at(layer) for layer in range(4)] == ["global", "local", "local", "global"]


@pytest.mark.parametrize("case", ["gemma3", "llama"])
def test_float32_inside_the_classes_would_be_seen(case: str, pairs: Callable[[str], Pair]) -> None:
    """Why `InFloat64` is there, and that the comparison notices what it takes away."""
    pair, ids, positions = pairs(case), some_ids(), np.arange(TOKENS)
    plain = families.logits_of_class(pair.theirs, ids, positions).astype(np.float64)
    assert 10 * LIMIT < apart(ours(pair.path, ids, positions), plain) < 1e-3


# ---------------------------------------------------------------- mutations: the comparison can fail


@pytest.mark.parametrize("case", ["gemma3", "llama", "llama-tied", "gpt2"])
def test_every_perturbed_tensor_is_seen(case: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    pair, ids, positions = pairs(case), some_ids(), np.arange(TOKENS)
    theirs, folder = pair.logits(ids, positions), open_folder(pair.path)
    unseen = []
    for i, name in enumerate(sorted(folder.shapes)):
        noise = np.random.default_rng(i).standard_normal(folder.shapes[name])
        write_folder(folder, tmp_path / str(i), {name: folder.tensor(name) + 1e-5 * noise})
        if not apart(ours(tmp_path / str(i), ids, positions), theirs) > 100 * LIMIT:
            unseen.append(name)
    assert len(folder.shapes) > 20 and not unseen


@pytest.mark.parametrize("case", ["gemma3", "llama", "gpt2"])
def test_shifted_positions_are_seen(case: str, pairs: Callable[[str], Pair]) -> None:
    pair, ids, positions = pairs(case), some_ids(), np.arange(TOKENS)
    theirs = pair.logits(ids, positions)
    later = positions + (np.arange(TOKENS) >= 6)  # the second half one further away from the first
    assert apart(ours(pair.path, ids, later), theirs) > 1e-4
    shifted = apart(ours(pair.path, ids, positions + 1), theirs)
    assert shifted > 1e-4 if case == "gpt2" else shifted <= LIMIT  # learned positions; rotary are relative


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("gemma3", "sliding_window", 6),
        ("gemma3", "rms_norm_eps", 1e-5),
        ("gemma3-scale-dim", "query_pre_attn_scalar", 13),
        ("gemma3-linear-rope", "rope_parameters.full_attention.factor", 7.0),
        ("gemma3-linear-rope", "rope_parameters.full_attention.rope_theta", 10000.0),
        ("gemma3-linear-rope", "rope_parameters.sliding_attention.rope_theta", 5000.0),
        ("gemma3-layer-types", "layer_types", [*MIXED_LAYERS[::-1][:3], "sliding_attention"]),
        ("llama", "rope_parameters.rope_theta", 5000.0),
        ("llama-linear", "rope_parameters.factor", 3.0),
        ("llama-3", "rope_parameters.factor", 7.0),
        ("llama-3", "rope_parameters.original_max_position_embeddings", 24),
        ("llama-3", "rope_parameters.low_freq_factor", 0.5),
        ("llama-3", "rope_parameters.high_freq_factor", 8.0),
        ("gpt2", "layer_norm_epsilon", 1e-4),
    ],
)
def test_a_changed_setting_is_seen(
    case: str, key: str, value: Any, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    """Every setting is taken from the configuration, none from a default."""
    pair, ids, positions = pairs(case), some_ids(), np.arange(TOKENS)
    copy = changed_config(pair, tmp_path / "copy", {key: value})
    assert apart(ours(copy, ids, positions), pair.logits(ids, positions)) > 100 * LIMIT


# ---------------------------------------------------------------- configurations


def changed_config(pair: Pair, path: Path, changes: dict[str, Any]) -> Path:
    """A copy of the folder with settings changed; `a.b` reaches into a section, REMOVE takes a key away."""
    write_folder(open_folder(pair.path), path, {})
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    for key, value in changes.items():
        *outer, last = key.split(".")
        place = config
        for part in outer:
            place = place.setdefault(part, {})
        place.pop(last, None)
        if value is not REMOVE:
            place[last] = value
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


REMOVE = object()
BASE = {"gemma3": "gemma3-linear-rope", "llama": "llama", "gpt2": "gpt2"}
OLD_GEMMA = {"rope_parameters": REMOVE, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "layer_types": REMOVE}
OLD_LLAMA = {"rope_parameters": REMOVE, "rope_theta": 10000.0, "rope_scaling": None}

REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("llama", {"hidden_act": "relu6"}, "hidden_act", "relu6"),
    ("llama", {"rope_parameters.rope_type": "yarn"}, "rope_parameters.rope_type", "yarn"),
    ("llama", {**OLD_LLAMA, "rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type", "longrope"),
    ("llama", {**OLD_LLAMA, "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.type", "yarn"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping", "30.0"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping", "50.0"),
    ("gemma3", {"attention_bias": True}, "attention_bias", "True"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention", "True"),
    ("gemma3", {"hidden_activation": "gelu"}, "hidden_activation", "gelu"),
    ("gemma3", {"tie_word_embeddings": False}, "tie_word_embeddings", "False"),
    ("gemma3", {"rope_parameters.full_attention.rope_type": "yarn"}, "full_attention.rope_type", "yarn"),
    ("gemma3", {"rope_parameters.full_attention.rope_type": "llama3"}, "full_attention.rope_type", "llama3"),
    ("gemma3", {"rope_parameters.sliding_attention.rope_type": "linear"}, "sliding_attention.rope_type", "linear"),
    ("gemma3", {**OLD_GEMMA, "rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_scaling.rope_type", "yarn"),
    ("gemma3", {**OLD_GEMMA, "rope_scaling": {"type": "yarn", "factor": 8.0}}, "rope_scaling.type", "yarn"),
    ("gemma3", {**OLD_GEMMA, "sliding_window_pattern": 3}, "sliding_window_pattern", "3"),
    ("gemma3", {"layer_types": ["full_attention"] * 6 + ["chunked_attention"]}, "layer_types", "chunked_attention"),
    ("gpt2", {"activation_function": "quick_gelu"}, "activation_function", "quick_gelu"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights", "False"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx", "True"),
    ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings", "False"),
]


@pytest.mark.parametrize(("family", "changes", "name", "shown"), REFUSED)
def test_an_unsupported_setting_is_refused_by_name(
    family: str, changes: dict[str, Any], name: str, shown: str, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    path = changed_config(pairs(BASE[family]), tmp_path / "copy", changes)
    with pytest.raises(BadInput) as error:
        architecture_from_config(path)
    assert name in str(error.value) and shown in str(error.value)
    with pytest.raises(BadInput, match=name.rpartition(".")[2]):
        open_model(path)


@pytest.mark.parametrize("kind", ["t5", "gemma3", "llama4", None])
def test_an_unsupported_model_type_lists_what_is(kind: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({} if kind is None else {"model_type": kind}), encoding="utf-8")
    with pytest.raises(BadInput) as error:
        architecture_from_config(file)
    assert repr(kind) in str(error.value) and ", ".join(sorted(supported())) in str(error.value)


SIZES = [("gemma3", "sliding_window"), ("llama", "hidden_size"), ("gpt2", "n_head")]


@pytest.mark.parametrize(("family", "key"), SIZES)
def test_a_missing_size_is_named(family: str, key: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    path = changed_config(pairs(BASE[family]), tmp_path / "copy", {key: REMOVE})
    with pytest.raises(BadInput, match=f"{key} is missing"):
        architecture_from_config(path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "line 1, column 2"), ("[]", "expected a JSON object"), (None, "no config.json")]
)
def test_an_unreadable_configuration(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        architecture_from_config(tmp_path)


def test_folder_and_file_give_the_same_architecture(pairs: Callable[[str], Pair]) -> None:
    for case in CASES:
        path = pairs(case).path
        assert architecture_from_config(path) == architecture_from_config(path / "config.json")
        assert architecture_from_config(path) == open_model(path).architecture


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("gemma3", OLD_GEMMA),
        ("gemma3-linear-rope", {**OLD_GEMMA, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("gemma3-linear-rope", {**OLD_GEMMA, "rope_scaling": {"type": "linear", "factor": 8.0}}),
        ("gemma3", {**OLD_GEMMA, "sliding_window_pattern": 6, "rope_scaling": None}),
        ("llama", OLD_LLAMA),
        ("llama-linear", {**OLD_LLAMA, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("llama-3", {**OLD_LLAMA, "rope_theta": 500.0, "rope_scaling": LLAMA3}),
        ("llama", {"tie_word_embeddings": REMOVE}),
    ],
)
def test_configurations_of_older_releases_mean_the_same(
    case: str, changes: dict[str, Any], pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    """The spelling of transformers before release 5, in which most published checkpoints are."""
    pair, ids, positions = pairs(case), some_ids(), np.arange(TOKENS)
    path = changed_config(pair, tmp_path / "copy", changes)
    assert apart(ours(path, ids, positions), pair.logits(ids, positions)) <= LIMIT


# ---------------------------------------------------------------- tensors that do not fit


def rewritten(pair: Pair, path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    write_folder(open_folder(pair.path), path, {})
    file = path / "model.safetensors"
    tensors = dict(load_file(file))
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return path


VICTIMS = {
    "gemma3": ("model.layers.5.self_attn.k_norm.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight"),
    "llama": ("lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"),
    "gpt2": ("transformer.h.1.attn.c_attn.bias", "transformer.h.2.mlp.c_fc.weight", "transformer.ln_f.bias"),
}


@pytest.mark.parametrize("family", VICTIMS)
def test_tensors_that_do_not_fit_are_all_named(family: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    missing, turned, short = VICTIMS[family]
    extra = turned.replace("weight", "lora_A")

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        del tensors[missing]
        tensors[turned] = np.ascontiguousarray(tensors[turned].T)
        tensors[short] = tensors[short][:-1].copy()
        tensors[extra] = np.zeros((2, 2))

    shape = list(open_folder(pairs(BASE[family]).path).shapes[turned])
    with pytest.raises(BadInput) as error:
        open_model(rewritten(pairs(BASE[family]), tmp_path / "copy", spoil))
    text = str(error.value)
    assert f"{missing} is missing" in text
    assert f"{turned} has shape {shape[::-1]}, expected {shape}" in text
    assert f"{short} has shape [23], expected [24]" in text
    assert f"{extra} is not part of" in text


@pytest.mark.parametrize("family", VICTIMS)
def test_a_missing_embedding_is_the_only_fault(family: str, pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """Without it the other tensors must still be found under their common prefix."""
    name = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    with pytest.raises(BadInput) as error:
        open_model(rewritten(pairs(BASE[family]), tmp_path / "copy", lambda tensors: tensors.__delitem__(name)))
    assert str(error.value).endswith(f"do not fit the configuration: {name} is missing")


def test_many_faults_are_counted(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if "norm" in n]:
            del tensors[name]

    with pytest.raises(BadInput) as error:
        open_model(rewritten(pairs("llama"), tmp_path / "copy", spoil))
    text = str(error.value)  # two norms a layer, and the last
    assert text.count("is missing") + int(text.rpartition("and ")[2].split()[0] if "more" in text else 0) == 7


def test_a_tied_head_may_be_stored_too(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """Some checkpoints hold the tied matrix twice; it is not an extra tensor."""
    pair, ids, positions = pairs("llama-tied"), some_ids(), np.arange(TOKENS)

    def twice(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    path = rewritten(pair, tmp_path / "copy", twice)
    assert apart(ours(path, ids, positions), pair.logits(ids, positions)) <= LIMIT


def test_gpt2_opens_without_the_prefix(pairs: Callable[[str], Pair], tmp_path: Path) -> None:
    """The published GPT-2 has neither prefix nor head, but has the mask as a tensor."""
    pair, ids, positions = pairs("gpt2"), some_ids(), np.arange(TOKENS)

    def published(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 64, 64))

    path = rewritten(pair, tmp_path / "copy", published)
    assert apart(ours(path, ids, positions), pair.logits(ids, positions)) <= LIMIT


@pytest.mark.parametrize("case", CASES)
def test_slots_and_tensors_are_one_to_one(case: str, pairs: Callable[[str], Pair]) -> None:
    """Every value of the file is in one slot, and a slot's values go back to where they came from."""
    insist_that_slots_cover(open_model(pairs(case).path))
