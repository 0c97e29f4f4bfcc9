"""The names that people reach for: one call for texts, ids, models in memory and models by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import blockkit as bk
from blockkit.errors import BadInput

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONTEXT, QUERY = "w1 w2 w3 w4", "w5 w6"
IDS = [[2, 3, 4, 5]], [[6, 7]]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes)).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate(["<unk>", *(f"w{i}" for i in range(49))])}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return found


@pytest.fixture(scope="module")
def folder(model: Any, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def same(a: bk.Patch, b: bk.Patch) -> bool:
    return a.query == b.query and all(
        np.array_equal(x.left, y.left) and np.array_equal(x.right, y.right)
        for x, y in zip(a.changes.values(), b.changes.values(), strict=True)
    )


def test_ids_and_texts_give_the_same_patch(model: Any, tokenizer: Tokenizer) -> None:
    from blockkit.backends.pytorch import absorb

    own = absorb(model, torch.tensor(IDS[0]), torch.tensor(IDS[1]), strategy="matrix")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for given in (
        tuple(map(torch.tensor, IDS)), tuple(map(np.array, IDS)), IDS,
        (tokenizer, CONTEXT, QUERY), (fast, CONTEXT, QUERY),
    ):  # fmt: skip
        assert same(bk.absorb(model, *given, strategy="matrix"), own)
    assert own.measured["linf"] < 1e-5


def test_the_backends_own_options_are_passed_on(model: Any) -> None:
    patch = bk.absorb(model, *IDS, tokens="all", freeze="mlp.*")
    assert not any("mlp" in slot for slot in patch.changes)
    with pytest.raises(BadInput, match="absorb takes no 'frozen' for a PyTorch model; allowed are strategy, tokens"):
        bk.absorb(model, *IDS, frozen="mlp.*")


def test_absorbing_in_place_tells_how_far_it_is(model: Any) -> None:
    told: list[tuple[str, float]] = []
    bk.absorb(model, *IDS, progress=lambda stage, fraction: told.append((stage, fraction)))
    stages = ("finding the blocks", "running the contextual model", "absorbing", "running the edited model")
    assert tuple(dict.fromkeys(stage for stage, _ in told)) == stages
    assert [f for stage, f in told if stage == "absorbing"] == [0.0, 0.5]


def test_a_model_by_name_has_its_own_tokenizer(folder: Path, model: Any) -> None:
    patch = bk.absorb(folder, CONTEXT, QUERY, backend="numpy", dtype="float64")
    assert patch.query == (6, 7) and patch.dtype == "float64" and patch.measured["linf"] < 1e-10
    with pytest.raises(BadInput, match="takes two texts, context and query, got list, list"):
        bk.absorb(str(folder), *IDS)
    with pytest.raises(BadInput, match="takes no 'freeze' for a model by name; allowed are backend, dtype"):
        bk.absorb(str(folder), CONTEXT, QUERY, freeze="*")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "takes context_ids and query_ids, or a tokenizer and two texts .*, got nothing"),
        ((CONTEXT, QUERY), "or a tokenizer and two texts .*, got str, str"),
        ((3, CONTEXT, QUERY), r"a int is no tokenizer: it has no encode\(text, add_special_tokens=...\)"),
        (([["a"]], IDS[1]), "context must be token ids"),
        (([[1], [2, 3]], IDS[1]), "context must be token ids"),
    ],
)
def test_what_is_neither_ids_nor_texts(model: Any, given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        bk.absorb(model, *given)


def test_a_text_without_tokens_and_a_tokenizer_of_another_kind(model: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match="the query has no tokens"):
        bk.absorb(model, tokenizer, CONTEXT, "")

    class Odd:
        def encode(self, text: str) -> list[int]:
            return [1]

    with pytest.raises(BadInput, match=r"Odd\.encode does not take a text with add_special_tokens"):
        bk.absorb(model, Odd(), CONTEXT, QUERY)


def test_generating_in_memory_by_name_and_from_ids(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    told: list[str] = []
    by_text = bk.generate(model, tokenizer, CONTEXT, max_new_tokens=3, progress=lambda stage, _: told.append(stage))
    by_ids = bk.generate(model, torch.tensor(IDS[0]), max_new_tokens=3)
    by_name = bk.generate(str(folder), CONTEXT, max_new_tokens=3)
    ids = [[s.id for s in found.steps] for found in (by_text, by_ids, by_name)]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) == 3 and told.count("generating") == 3
    assert by_text.faithful and by_text.text == tokenizer.decode(ids[0]) == by_name.text
    assert by_ids.text == " ".join(map(str, ids[0])) and by_ids.prompt == (2, 3, 4, 5)
    assert repr(by_text).startswith("<Generated: 3 tokens, 3 the same from the patched model: ")


def test_a_model_in_memory_has_a_dtype_of_its_own(model: Any) -> None:
    double = transformers.LlamaForCausalLM(model.config).double().eval()
    assert bk.generate(double, IDS[0], max_new_tokens=1).settings.dtype == "float64"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "takes prompt_ids, or a tokenizer and a text, got nothing"),
        ((CONTEXT,), "takes prompt_ids, or a tokenizer and a text, got str"),
        (([[1, 2], [3, 4]],), "must be ids of one sequence"),
        ((object(), CONTEXT), r"a object is no tokenizer: it has no decode"),
        (([[1]],), "the prompt is 1 token"),
    ],
)
def test_what_is_no_prompt(model: Any, given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        bk.generate(model, *given)


def test_export_takes_a_patch_or_its_file(model: Any, tmp_path: Path) -> None:
    patch = bk.absorb(model, *IDS, strategy="matrix")
    patch.save(tmp_path / "patch.safetensors")
    for number, given in enumerate((patch, tmp_path / "patch.safetensors")):
        assert bk.export(given, tmp_path / str(number)).ranks and (tmp_path / str(number)).is_dir()
    with pytest.raises(BadInput, match="allowed are peft"):
        bk.export(patch, tmp_path / "x", format="gguf")
    with pytest.raises(BadInput, match="a int is no patch"):
        bk.export(3, tmp_path / "x")  # type: ignore[arg-type]


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, blockkit as bk\n"
        "assert {'absorb', 'export', 'generate', 'Session', 'draw'} <= set(dir(bk)) & set(bk.__all__)\n"
        "bk.absorb, bk.export, bk.generate, bk.Session, bk.draw\n"
        "heavy = {'torch', 'keras', 'jax', 'tensorflow', 'transformers', 'matplotlib', 'peft', 'tokenizers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert callable(bk.absorb) and callable(bk.generate) and callable(bk.export)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
