"""Generation, token by token: the contextual model beside a patched one, on small models of several kinds."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import with_tokenizer
from command_line import CommandLine
from processes import HANGS
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch_modules import LanguageModel, LayerScale, drawn
from unchanged import hashes

from blockkit import extras
from blockkit.absorbing import generation as core
from blockkit.backends.pytorch import Patch, Sampling, generate
from blockkit.backends.pytorch.generating.decoding import Decoder, cache_keyword
from blockkit.backends.pytorch.generating.experiment import TransformersExperiment, reference_runs
from blockkit.backends.pytorch.generating.generate import Generation
from blockkit.backends.pytorch.generating.growing import Grown
from blockkit.errors import BadInput, NotPatchable

hf = pytest.importorskip("transformers")
PROMPT = torch.tensor([[5, 9, 14, 3, 22, 17, 8, 2, 11, 29]])
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
KINDS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **SIZES, sliding_window=6, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=61, n_embd=24, n_head=4, n_layer=2, n_positions=64, eos_token_id=1, bos_token_id=1)
    ),
    "no positions, a cache of its own": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, state_size=4, time_step_rank=4)
    ),
    "takes a cache, gives none": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(**SIZES, lru_width=24, attention_window_size=8)
    ),
    "convolutions beside attention": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention", "conv"])
    ),
    "no cache": lambda: LanguageModel(LayerScale(), LayerScale()),
    "no cache, counts positions": lambda: LanguageModel(LayerScale(), LayerScale(), positions=True),
}


@cache
def model_of(kind: str) -> nn.Module:
    """Shared: no test may leave a trace on it."""
    torch.manual_seed(0)
    return drawn(KINDS[kind]())


def run(kind: str = "llama", **options: Any) -> Generation:
    return generate(model_of(kind), PROMPT, **{"max_new_tokens": 5, **options})


# -- what is generated -----------------------------------------------------------------------------


def plain(model: nn.Module, count: int) -> list[int]:
    """Greedy decoding without any cache, by hand."""
    ids = PROMPT
    for _ in range(count):
        with torch.no_grad():
            found = model(ids)
        ids = torch.cat([ids, getattr(found, "logits", found)[:, -1:].argmax(-1)], 1)
    return ids[0, PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("tokens", ["each", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_patched_model_chooses_what_the_model_does(kind: str, tokens: str, merge: bool) -> None:
    model = model_of(kind)
    before = hashes(model)
    found = run(kind, tokens=tokens, merge=merge).finish()
    assert hashes(model) == before
    assert found.ids == [t.patched_id for t in found.tokens] == plain(model, 5)
    wanted, others, without = reference_runs(model, PROMPT, 1, found.ids, tokens == "each")
    # Without a cache every run may be the same sums, by the processor; then one unit in the last place is the floor.
    floor = max(np.spacing(abs(wanted).max()), *(abs(other - wanted).max() for other in others))
    assert 0 < floor < 1e-5 and abs(without - wanted).max() > 1000 * floor
    errors = [t.measured.linf for t in found.tokens if t.measured is not None]
    assert len(errors) == 5 and max(errors) <= 10 * floor
    if tokens == "all":
        assert found.measured is not None and found.measured.linf <= 10 * floor
        assert list(found.static_ids) == found.ids


@pytest.mark.parametrize("tokens", ["each", "all"])
def test_the_last_patch_can_be_applied_by_hand(tokens: str) -> None:
    model, found = model_of("gemma3"), run("gemma3", tokens=tokens).finish()
    kept, patch = [*PROMPT[0].tolist(), *found.ids], found.patch
    assert patch is not None
    query = kept[-2:-1] if tokens == "each" else kept[PROMPT.shape[1] - 1 : -1]
    assert list(patch.query) == query
    with torch.no_grad():
        wanted = model(torch.tensor([kept[:-1]])).logits[0, -len(query) :]
        with patch.applied(model):
            own = model(torch.tensor([query]), position_ids=torch.as_tensor(patch.position_ids)).logits[0]
    assert (own - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("tokens", ["each", "all"])
def test_without_comparing_it_generates_the_same(tokens: str) -> None:
    found = run(tokens=tokens, compare_logits=False).finish()
    assert found.ids == run(tokens=tokens).finish().ids
    assert all(t.patched_id is None and t.measured is None for t in found.tokens)
    assert found.patch is not None and (found.measured is not None) == (tokens == "all")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_growing_gives_the_contextual_bits(dtype: torch.dtype) -> None:
    """Where attention's output is restored, all else is the same sums; only the first step runs in another shape."""
    model = copy.deepcopy(model_of("gemma3")).to(dtype)
    _first, *later = generate(model, PROMPT, tokens="all", max_new_tokens=8).finish().tokens
    assert [t.measured.linf for t in later if t.measured is not None] == [0.0] * 7


def test_a_longer_query_grows_too() -> None:
    found = run(query=6, tokens="all").finish()
    assert found.ids == run().finish().ids
    assert len(found.static_ids) == 6 + 5 - 1 and found.measured is not None and found.measured.linf < 1e-5


@pytest.mark.parametrize("tokens", ["each", "all"])
def test_draws_repeat_with_their_seed_and_both_models_share_them(tokens: str) -> None:
    sampling = {"temperature": 1.5, "top_k": 20, "top_p": 0.95}
    runs = [run(tokens=tokens, max_new_tokens=12, sampling=Sampling(**sampling, seed=s)).finish() for s in (3, 3, 4)]
    assert runs[0].ids == runs[1].ids != runs[2].ids
    assert all(t.id == t.patched_id for r in runs for t in r.tokens)
    assert runs[0].ids != plain(model_of("llama"), 12)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])

    def shares(sampling: Sampling) -> Tensor:
        generator = sampling.generator()
        drawn = [sampling.choose(logits, sampling.noise(4, generator)) for _ in range(4000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / 4000

    assert (shares(Sampling(1.0)) - logits.softmax(-1)).abs().max() < 0.03
    assert (shares(Sampling(2.0)) - (logits / 2).softmax(-1)).abs().max() < 0.03
    two = torch.cat([logits[:2].softmax(-1), torch.zeros(2)])
    assert (shares(Sampling(1.0, top_k=2)) - two).abs().max() < 0.03
    assert (shares(Sampling(1.0, top_p=0.7)) - two).abs().max() < 0.03  # 0.64 is too little
    assert (shares(Sampling(1.0, top_p=0.6))).tolist() == [1, 0, 0, 0]
    assert (shares(Sampling(1.0, top_k=1))).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("tokens", ["each", "all"])
def test_nothing_follows_a_stop_id(tokens: str) -> None:
    sampling = Sampling(3.0, seed=1)
    ids = run(tokens=tokens, sampling=sampling).finish().ids
    assert len(set(ids[:3])) == 3
    found = run(tokens=tokens, sampling=sampling, stop_at=frozenset({ids[2]})).finish()
    assert found.ids == ids[:3]
    assert (found.measured is not None) == (tokens == "all")


# -- on the way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["each", "all"])
def test_tokens_come_one_by_one_and_breaking_off_leaves_no_trace(tokens: str) -> None:
    model = model_of("gpt2")
    before, calls = hashes(model), []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = run("gpt2", tokens=tokens)
        counts = []
        for _ in found:
            counts.append(len(calls))
            assert hashes(model) == before  # also between two tokens
            if len(found.tokens) == 3:
                break
        assert len(found.tokens) == 3 and all(later > earlier for earlier, later in pairwise(counts))
        assert len(calls) == counts[-1]
    finally:
        hook.remove()
    assert hashes(model) == before
    assert run("gpt2", tokens=tokens).finish().ids[:3] == found.ids


@pytest.mark.parametrize("tokens", ["each", "all"])
@pytest.mark.parametrize("number", [2, 4])
def test_failing_in_the_middle_leaves_no_trace(tokens: str, number: int) -> None:
    model, calls = model_of("llama"), []
    before = hashes(model)
    ids = run(tokens=tokens).finish().ids

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tokens=tokens).finish()
    finally:
        hook.remove()
    assert hashes(model) == before
    assert run(tokens=tokens).finish().ids == ids


def test_a_cache_that_is_not_given_back_is_not_relied_on() -> None:
    model = model_of("takes a cache, gives none")
    from blockkit.backends.pytorch.calling.interface import Interface
    from blockkit.backends.pytorch.calling.prompts import joined

    interface = Interface.of(model)
    whole = joined(model, PROMPT[:, :8], PROMPT[:, 8:], (None, None))
    decoder = Decoder(model, interface, cache_keyword(model, interface, whole))
    with torch.no_grad():
        decoder.run(whole.part(0, 8))
        found, wanted = decoder.run(whole.part(8)), model(PROMPT, use_cache=False).logits[:, -1:]
    assert decoder.cache is None and (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "convolutions beside attention"])
def test_a_step_runs_one_token_whatever_the_cache_is_called(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    model, lengths = model_of(kind), list[int]()
    run(kind, tokens="all")

    def note(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        lengths.append(result[0].shape[-2])

    layers = model.transformer.h if kind == "gpt2" else model.model.layers
    hook = layers[0].register_forward_hook(note, with_kwargs=True)
    steps = []
    try:
        for _ in generate(model, PROMPT, tokens="all", max_new_tokens=4, compare_logits=False):
            steps.append(list(lengths))
            lengths.clear()
    finally:
        hook.remove()
    assert steps[1:3] == [[1, 1]] * 2  # the contextual run and the reduced one; the first reads all, the last proves
    assert not [w for w in recwarn if "whole prompt runs again" in str(w.message)]


def test_a_model_without_a_cache_is_said_to_be_slow() -> None:
    with pytest.warns(UserWarning, match="LanguageModel takes no cache .* the whole prompt runs again"):
        run("no cache")


def test_a_cache_that_does_not_hold_is_none() -> None:
    class Forgets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of("llama")
            self.config = self.inner.config

        def forward(self, input_ids: Tensor, position_ids: Any = None, use_cache: Any = None, **kwargs: Any) -> Any:
            return self.inner(input_ids, position_ids=position_ids, use_cache=use_cache)

    with pytest.warns(UserWarning, match="Forgets takes no cache"):
        found = generate(Forgets().eval(), PROMPT, max_new_tokens=2).finish()
    assert found.ids == run(max_new_tokens=2).finish().ids


def test_a_token_that_asks_for_nothing_is_kept_too() -> None:
    rng = torch.Generator().manual_seed(0)
    inputs, wanted = (torch.randn(3, width, generator=rng).double().numpy() for width in (6, 4))
    grown = Grown(torch.zeros(0, 4).double().numpy(), torch.zeros(0, 6).double().numpy())
    for number, z in enumerate(inputs):
        now = z @ grown.right.T @ grown.left
        wanted[number] = now if number == 1 else wanted[number]
        assert grown.grow(z, wanted[number] - now)
    assert abs(inputs @ grown.right.T @ grown.left - wanted).max() < 1e-12
    assert not grown.grow(inputs[0] + inputs[1], wanted[0])


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "wanted"),
    [
        (PROMPT[:, :1], {}, "n > 1"),
        (PROMPT[0], {}, "ids \\[1, n\\]"),
        (PROMPT.repeat(2, 1), {}, "ids \\[1, n\\]"),
        ([1, 2, 3], {}, "ids \\[1, n\\]"),
        (PROMPT + 60, {}, "the model knows 0 to 60"),
        (PROMPT, {"query": 10}, "n > 10"),
        (PROMPT, {"query": 0}, "at least 1"),
        (PROMPT, {"tokens": "last"}, "allowed are each, all"),
        (PROMPT, {"max_new_tokens": 0}, "at least 1"),
        (PROMPT, {"max_new_tokens": 56}, "places for 64"),
        (PROMPT, {"max_new_tokens": 1.5}, "max_new_tokens must be a whole number of at least 1, got 1.5"),
        (PROMPT, {"query": "1"}, "query must be a whole number of at least 1, got '1'"),
        (PROMPT, {"stop_at": ["a"]}, "stop_at must be ids"),
        (PROMPT, {"sampling": {"seed": 3}}, "sampling must be a Sampling"),
    ],
)
def test_bad_arguments_are_named(prompt: Any, options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(BadInput, match=wanted):
        generate(model_of("llama"), prompt, **options)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": None},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": "a"},
        {"seed": None},
        {"seed": 2**64},
    ],
)
def test_chance_has_its_limits(sampling: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(sampling))):
        Sampling(**sampling)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(BadInput, match="eval"):
        generate(drawn(KINDS["llama"]()).train(), PROMPT)


def test_more_tokens_than_a_static_patch_can_serve() -> None:
    with pytest.raises(NotPatchable, match="for 41 tokens"):
        run(tokens="all", max_new_tokens=40).finish()  # o_proj reads 32 numbers
    assert len(run(tokens="all", max_new_tokens=20).finish().ids) == 20


# -- the experiment --------------------------------------------------------------------------------


def test_a_patch_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor and the unpatched model are measured apart from what they judge."""
    experiment = TransformersExperiment(model_of("llama"), PROMPT[0].tolist(), core.Settings(4), stops=False)
    steps, yards = list(experiment.steps()), experiment.yardsticks()
    good = core.Generated(core.Settings(4), (), tuple(steps), ("",) * 4, "", tuple(yards), None, 1.0, {})
    assert good.faithful and all(y.stable and y.margin > 0 and y.floor.linf < 1e-5 < y.unpatched.linf for y in yards)
    wrong = core.Step(steps[1].id, steps[1].id + 1, 1.0, 1.0, (0.0, 0.0, 0.0))
    bad = core.Generated(
        core.Settings(4), (), (steps[0], wrong, *steps[2:]), ("",) * 4, "", tuple(yards), None, 1.0, {}
    )
    assert not bad.faithful


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer("gemma3_text", tmp_path_factory.mktemp("models") / "gemma")


WORDS = ("--prompt", "w1 w2 w3 w4 w5 w6", "--max-new-tokens", "4")


@pytest.mark.parametrize("more", [(), ("--tokens", "all", "--merge"), ("--temperature", "1.5", "--top-k", "20")])
def test_the_command_prints_json_alone(cli: CommandLine, checkpoint: Path, more: tuple[str, ...]) -> None:
    done = cli("generate", "--model", checkpoint, *WORDS, *more, "--json", "--metrics", "m.json")
    assert done.status == 0 and "generating" in done.err
    found = done.json
    assert found["agreement"] == found["new_tokens"] == len(found["tokens"]) == 4 and found["faithful"]
    assert found["linf"] <= 10 * found["floor_linf"] < found["unpatched_linf"]
    assert (found["static"] is not None) == ("all" in more)
    assert found["text"] == " ".join(t["text"].strip() for t in found["tokens"])
    assert json.loads(Path("m.json").read_text()) == found


def test_the_page_the_metrics_and_the_plot(cli: CommandLine, checkpoint: Path) -> None:
    pytest.importorskip("matplotlib")
    Path("prompt.txt").write_text("w1 w2 w3 w4 w5 w6")
    words = ("generate", "--model", checkpoint, "--prompt", "@prompt.txt", "--max-new-tokens", "4", "--tokens", "all")
    done = cli(*words, "--metrics", "m.csv", "--plot", "p.svg")
    assert done.status == 0
    for part in ("same token: 4 of 4", "recompute floor", "no patch", "finished static weights", "seconds: load"):
        assert part in done.out
    with Path("m.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["agree"] for r in rows] == ["True"] * 4
    assert all(float(r["linf"]) < float(r["unpatched_linf"]) for r in rows)
    assert "<svg" in Path("p.svg").read_text()
    assert {p.name for p in Path().iterdir()} == {"prompt.txt", "m.csv", "p.svg"}


@pytest.mark.parametrize("tokens", ["each", "all"])
def test_the_patch_is_written(tokens: str, cli: CommandLine, checkpoint: Path) -> None:
    done = cli("generate", "--model", checkpoint, *WORDS, "--tokens", tokens, "--out", "p.safetensors", "--json")
    assert done.status == 0 and done.json["out"] == "p.safetensors"
    patch, model = Patch.load("p.safetensors"), hf.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    chosen = [token["id"] for token in done.json["tokens"]]
    assert list(patch.query[1:]) == chosen[:3] if tokens == "all" else list(patch.query) == chosen[2:3]
    with torch.no_grad(), patch.applied(model):
        own = model(torch.as_tensor(patch.query_ids), position_ids=patch.position_ids).logits[0].argmax(-1)
    assert own.tolist() == (chosen if tokens == "all" else chosen[3:])
    assert {p.name for p in Path().iterdir()} == {"p.safetensors"}


def test_tokens_are_printed_before_the_last_one_is_known(
    cli: CommandLine, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: TransformersExperiment) -> Any:
        for number, step in enumerate(whole(self)):
            if number == 2:
                raise KeyboardInterrupt
            yield step

    whole = TransformersExperiment.steps
    monkeypatch.setattr(TransformersExperiment, "steps", broken)
    done = cli("generate", "--model", checkpoint, *WORDS, "--metrics", "m.json")
    assert done.status == 130 and done.out.count("yes") == 2 and "interrupted" in done.err
    assert not list(Path().iterdir())


LINGERING = """
import time
from blockkit.backends.pytorch.generating.experiment import TransformersExperiment
whole = TransformersExperiment.steps
def steps(self):
    for number, step in enumerate(whole(self)):
        if number == 2:
            time.sleep(600)
        yield step
TransformersExperiment.steps = steps
from blockkit.cli.main import main
main()
"""


def test_ctrl_c_ends_it(checkpoint: Path, tmp_path: Path) -> None:
    words = ["generate", "--model", str(checkpoint), "--prompt", "w1 w2 w3", "--max-new-tokens", "50"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    call = [sys.executable, "-c", LINGERING, *words]
    process = subprocess.Popen(call, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.readline()  # the first token is there
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 130 and out.count("yes") <= 2
    assert "interrupted" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--prompt", ""), "--prompt is empty"),
        (("--prompt", "w1"), "it takes two"),
        (("--prompt", "@nothing"), "cannot read the file"),
        (("--model", "nowhere"), "does not exist"),
        (("--model", " "), "is empty"),
        (("--max-new-tokens", "0"), "at least 1"),
        (("--max-new-tokens", "100"), "places for 64"),
        (("--dtype", "int8"), "--dtype"),
        (("--tokens", "last"), "--tokens"),
        (("--strategy", "magic"), "--strategy"),
        (("--temperature", "-1"), "temperature"),
        (("--top-k", "0"), "top_k"),
        (("--top-p", "1.5"), "top_p"),
        (("--seed", "-1"), "seed"),
        (("--metrics", "m.txt"), "must end in .json or .csv"),
        (("--plot", "p.gif"), "must end in .png, .svg or .pdf"),
        (("--metrics", "nowhere/m.json"), "cannot write"),
    ],
)
def test_bad_input_ends_in_one_message(cli: CommandLine, checkpoint: Path, words: tuple[str, ...], wanted: str) -> None:
    defaults = {"--model": str(checkpoint), "--prompt": "w1 w2 w3"}
    given = {**defaults, words[0]: words[1]}
    assert wanted in cli.refused("generate", *(part for pair in given.items() for part in pair), "--json")


def test_a_folder_that_transformers_cannot_load(cli: CommandLine, checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    (broken / "config.json").write_text('{"model_type": "unheard-of"}')
    assert "transformers cannot load" in cli.refused("generate", "--model", broken, "--prompt", "w1 w2", "--json")


def test_a_checkpoint_that_lacks_a_tensor(cli: CommandLine, checkpoint: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    said = cli.refused("generate", "--model", broken, "--prompt", "w1 w2", "--json")
    assert "no fitting tensor for model.layers.0.mlp.down_proj.weight (of 1)" in said


@pytest.mark.parametrize("package", ["transformers", "matplotlib"])
def test_a_missing_package_is_named_with_its_install_line(
    cli: CommandLine, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = cli.refused("generate", "--model", checkpoint, *WORDS, "--plot", "p.png", "--json")
    assert f'pip install "blockkit-patch[{extras.EXTRAS[package]}]"' in message
