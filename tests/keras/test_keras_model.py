"""The Keras model on every backend that is installed, each in processes of its own; and what an import costs."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras_checks as checks
import pytest
from processes import SMALL_MODELS, python

BACKENDS = ("jax", "tensorflow", "torch")
FAMILIES = tuple(checks.CONFIGS)
ONE_PROCESS = (
    "environment", "wrong_backend", "shared", "dtype",
    *(f"forward:{f}" for f in FAMILIES), *(f"train:{f}" for f in FAMILIES),
)  # fmt: skip
Result = dict[str, Any]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Result]:
    """What a check measured on a backend; a backend's processes are run when it is first asked for."""
    known: dict[str, Result] = {}
    folder = tmp_path_factory.mktemp("keras")

    def run(backend: str) -> Result:
        place = folder / backend
        for family in FAMILIES:
            checks.write_checkpoint(family, place / family)
        found: Result = {}
        only = ("unknown_length",) if backend == "tensorflow" else ()
        for wanted in (ONE_PROCESS + only, tuple(f"load:{f}" for f in FAMILIES)):  # loading is another process's
            home, settings = folder / "home", {"KERAS_BACKEND": backend, **SMALL_MODELS}
            out = python(checks.__file__, place, *wanted, home=home, **settings)
            found.update(json.loads(out.splitlines()[-1]))
        return found

    def get(backend: str, check: str) -> Result:
        for module in ("keras", backend):
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
def test_logits_are_those_of_the_reference(backend: str, family: str, measured: Callable[[str, str], Result]) -> None:
    """In float32, in a batch and through the executor; at other positions they are others."""
    found = measured(backend, f"forward:{family}")
    apart = found["apart"]
    print(f"\n{backend} {family}: {apart['plain']:.3g}, executor {apart['executor']:.3g}, size {found['size']:.3g}")
    assert found["size"] > 0.5
    assert max(apart["plain"], apart["positions"], apart["executor"]) <= 1e-4
    assert apart["positions_matter"] > 1e-2


@every_backend
@every_family
def test_summary_names_the_blocks(backend: str, family: str, measured: Callable[[str, str], Result]) -> None:
    found = measured(backend, f"forward:{family}")
    for name in ["embedding", *checks.BLOCKS[family], "final"]:
        assert f"{name} (" in found["summary"]
    assert found["parameters"] == found["stored"]
    assert f"Total params: {found['stored']:,}" in found["summary"]


@every_backend
@every_family
def test_a_saved_model_loads_in_another_process(
    backend: str, family: str, measured: Callable[[str, str], Result]
) -> None:
    """By Keras alone, without custom objects, bit for bit."""
    found = measured(backend, f"load:{family}")
    assert found["equal"] and found["dtype"] == "float32" and found["name"] == family
    assert {s.split(".")[1] for s in found["slots"] if s.startswith("layers.")} == {
        str(i) for i in range(len(checks.BLOCKS[family]))
    }


@every_backend
@every_family
def test_training_starts_from_the_models_own_loss(
    backend: str, family: str, measured: Callable[[str, str], Result]
) -> None:
    found = measured(backend, f"train:{family}")
    first, second = found["losses"]
    assert first == pytest.approx(found["expected"], abs=1e-4)
    assert second < first - 1e-2
    assert found["finite"] and found["unmoved"] == []


@every_backend
@every_family
def test_fit_takes_arrays_whose_last_batch_is_smaller(
    backend: str, family: str, measured: Callable[[str, str], Result]
) -> None:
    found = measured(backend, f"train:{family}")
    evaluated, expected = found["evaluated"]
    assert evaluated == pytest.approx(expected, abs=1e-4)
    assert len(found["fitted"]) == 1 and 0 < found["fitted"][0] < 20
    assert found["unmoved_by_fit"] == []
    assert found["predicted"] == [5, checks.TOKENS, checks.VOCABULARY]


def test_an_unknown_length_is_refused(measured: Callable[[str, str], Result]) -> None:
    found = measured("tensorflow", "unknown_length")
    assert found["kind"] == "BadInput" and "sequences of a known length" in found["message"]


@every_backend
def test_a_shared_matrix_is_one_variable(backend: str, measured: Callable[[str, str], Result]) -> None:
    found = measured(backend, "shared")
    assert found["slots"] == [found["name"], "shared.global.mlp.down_proj"]
    assert found["saved"] == 1  # three layers of two kinds
    assert found["equal"] and found["moved"]


@every_backend
def test_a_file_keeps_the_dtype(backend: str, measured: Callable[[str, str], Result]) -> None:
    assert measured(backend, "dtype") == {"compute": "bfloat16", "weights": ["bfloat16"], "logits": "bfloat16"}


@every_backend
def test_openers_of_other_backends_name_the_remedy(backend: str, measured: Callable[[str, str], Result]) -> None:
    refused = measured(backend, "wrong_backend")["refused"]
    assert sorted(refused) == sorted(set(BACKENDS) - {backend})
    for wanted, message in refused.items():
        assert f"Keras is running on {backend}, not {wanted}" in message
        assert f"KERAS_BACKEND={wanted}" in message


@every_backend
def test_importing_the_backends_leaves_the_environment(backend: str, measured: Callable[[str, str], Result]) -> None:
    assert measured(backend, "environment") == {"ours": [], "selector": True, "backend": backend}


IMPORTED = """
import sys
import numpy
before = set(sys.modules)
import blockkit
added = set(sys.modules) - before
import json
print(json.dumps(sorted(added)))
"""


def test_import_is_light(tmp_path: Path) -> None:
    """Beside NumPy hardly another package, and few modules of the standard library; `make scale` has the seconds."""
    added = json.loads(python("-c", IMPORTED, home=tmp_path))
    own = [m for m in added if m.partition(".")[0] == "blockkit"]
    packages = {m.partition(".")[0] for m in added} - sys.stdlib_module_names
    assert packages <= {"blockkit", "platformdirs"} and own
    assert len(own) < 150 and len(added) - len(own) < 100, added
