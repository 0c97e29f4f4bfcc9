"""Every supported model type: its class's logits, an exact absorbed context, a checkpoint that the class can run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
from checkpoints import insist_that_slots_cover
from family_cases import CASES, IDS, POSITIONS, REQUEST, UNREAD, Family, relative
from processes import SMALL_MODELS, python
from safetensors.numpy import load_file, save_file

from blockkit.absorbing.executor import reference
from blockkit.absorbing.measure import recomputed
from blockkit.absorbing.metrics import compare
from blockkit.absorbing.run import logits_of, run_stream
from blockkit.checkpoint.configuration import supported
from blockkit.checkpoint.model import from_config, open_model, slots
from blockkit.errors import BadInput
from blockkit.patch.patch import Patch


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    folder, made = tmp_path_factory.mktemp("families"), {}

    def get(name: str) -> Family:
        made.setdefault(name, Family(name, folder / name))
        return made[name]

    return get


@pytest.fixture(scope="module")
def on_keras(family: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the float32 logits of every case on Keras with JAX."""
    for module in ("keras", "jax"):
        pytest.importorskip(module)
    paths = {name: family(name).pair.path for name in CASES}
    folder = next(iter(paths.values())).parent
    np.save(folder / "ids.npy", IDS)
    checks = str(Path(families.__file__).with_name("family_checks.py"))
    python(checks, str(folder), *CASES, home=tmp_path_factory.mktemp("home"), KERAS_BACKEND="jax", **SMALL_MODELS)
    return folder


every_case = pytest.mark.parametrize("name", CASES)


def test_every_supported_model_type_is_tried() -> None:
    assert {model_type for model_type, _ in CASES.values()} == set(supported())


@every_case
def test_logits_of_the_reference_are_those_of_the_class(name: str, family: Callable[[str], Family]) -> None:
    executor = reference(family(name).model, "float64")
    ours = logits_of(executor, run_stream(executor, IDS, POSITIONS))
    assert relative(ours, family(name).pair.logits(IDS, POSITIONS)) <= 1e-9


@pytest.mark.parametrize("name", ["gpt-neox", "falcon-two-norms", "bloom", "phi3"])
def test_exchanged_parts_of_a_fused_tensor_are_seen(name: str, family: Callable[[str], Family]) -> None:
    executor = reference(family(name).model, "float64")
    k, v = (f"layers.1.attention.{part}_proj" for part in "kv")
    exchanged = {**executor.parameters, k: executor.parameters[v], v: executor.parameters[k]}
    ours = logits_of(executor, run_stream(replace(executor, parameters=exchanged), IDS, POSITIONS))
    assert relative(ours, family(name).pair.logits(IDS, POSITIONS)) > 1e-3


@every_case
def test_logits_on_keras_are_those_of_the_class(name: str, family: Callable[[str], Family], on_keras: Path) -> None:
    theirs = families.logits_of_class(family(name).theirs, IDS, POSITIONS)
    found = np.load(on_keras / f"{name}.npy")
    assert theirs.dtype == found.dtype == np.float32
    assert relative(found, theirs) <= 1e-4


@every_case
def test_slots_read_and_write_every_tensor(name: str, family: Callable[[str], Family]) -> None:
    insist_that_slots_cover(family(name).model, UNREAD.get(name, 0))


@every_case
def test_the_runs_behind_the_floor_are_equal_on_paper(name: str, family: Callable[[str], Family]) -> None:
    executor = reference(family(name).model, "float64")
    contextual = logits_of(executor, run_stream(executor, IDS, POSITIONS))[-1:]
    for again, wanted in recomputed(executor, REQUEST, contextual):
        assert compare(again, wanted).linf <= 1e-12


@pytest.mark.parametrize("strategy", [None, "matrix"])
@every_case
def test_a_context_is_absorbed_to_the_recompute_floor(
    name: str, strategy: str | None, family: Callable[[str], Family]
) -> None:
    absorbed, measured = family(name).absorbed(strategy)
    floor = measured.floor.linf
    print(f"\n{name} {strategy}: {absorbed.measured.linf / floor:.3g} x floor {floor:.3g}")
    assert absorbed.measured.linf <= 10 * floor
    assert measured.unpatched.linf >= 1000 * floor


@every_case
def test_the_class_runs_the_written_checkpoint(name: str, family: Callable[[str], Family], tmp_path: Path) -> None:
    """The class's own contextual logits, from the query alone and the edited weights."""
    mine = family(name)
    absorbed, measured = mine.absorbed(None)
    Patch.of(absorbed, mine.model, "float32").merge_into(mine.model, tmp_path / "edited")
    edited = families.loaded(CASES[name][0], tmp_path / "edited")
    wanted = families.logits_of_class(mine.theirs, IDS, POSITIONS)[-1:]
    found = families.logits_of_class(edited, REQUEST.query, REQUEST.positions)[-1:]
    unpatched = families.logits_of_class(mine.theirs, REQUEST.query, REQUEST.positions)[-1:]
    assert compare(found, wanted).linf <= 10 * measured.floor.linf
    assert compare(unpatched, wanted).linf >= 1000 * measured.floor.linf


FIRST = {model_type: name for name, (model_type, _) in reversed(CASES.items())}


@pytest.mark.parametrize("model_type", FIRST)
def test_a_senseless_configuration_is_read_or_refused(model_type: str, family: Callable[[str], Family]) -> None:
    """Whatever stands in one place of config.json: an architecture with its slots, or a message."""
    config = family(FIRST[model_type]).model.folder.config
    refused = 0
    for key in config:
        for junk in (0, "x", [1]):
            try:
                list(slots(from_config({**config, key: junk}, "config.json")[0]))
            except BadInput:
                refused += 1
    assert refused > 10


REFUSED = [
    ("falcon", {"alibi": True}, "alibi"),
    ("falcon-two-norms", {"parallel_attn": False}, "parallel_attn"),
    ("gpt-neox", {"hidden_act": "quick_gelu"}, "hidden_act"),
    ("opt", {"word_embed_proj_dim": 12}, "word_embed_proj_dim"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_parameters.rope_type"),
    ("cohere", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ("bert", {"is_decoder": True}, "is_decoder"),
]


@pytest.mark.parametrize(("name", "changes", "key"), REFUSED)
def test_an_unsupported_setting_is_refused(
    name: str, changes: dict[str, Any], key: str, family: Callable[[str], Family]
) -> None:
    with pytest.raises(BadInput, match=f"{key} = .* is not supported for this family"):
        from_config({**family(name).model.folder.config, **changes}, "config.json")


SPELLINGS = [
    ("gpt-neox", {"rope_parameters": None, "rotary_emb_base": 500.0, "rotary_pct": 0.67}, {}),
    ("gpt-neox", {}, {"embed_out.weight": "lm_head.weight"}),
    ("phi3-partial", {"rope_parameters": None, "rope_theta": 500.0, "partial_rotary_factor": 0.67}, {}),
    ("bert", {}, {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}),
]


@pytest.mark.parametrize(("name", "settings", "names"), SPELLINGS)
def test_spellings_of_other_releases_mean_the_same(
    name: str, settings: dict[str, Any], names: dict[str, str], family: Callable[[str], Family], tmp_path: Path
) -> None:
    mine = family(name)
    tensors = load_file(mine.pair.path / "model.safetensors")
    for here, there in names.items():
        assert any(here in t for t in tensors)
        tensors = {t.replace(here, there): value for t, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {k: v for k, v in {**mine.model.folder.config, **settings}.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = open_model(tmp_path)
    assert other.architecture == mine.model.architecture
    assert all(np.array_equal(other.parameter(s), mine.model.parameter(s)) for s, _ in slots(other.architecture))
