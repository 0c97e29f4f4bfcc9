"""Patches as PEFT LoRA files: what `peft` makes of them in a new process, and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from families import GPT2, LLAMA, VOCABULARY, Pair, make, some_ids
from processes import python
from safetensors.numpy import load_file, save_file

from blockkit import Patch
from blockkit.absorbing.algorithm import absorb
from blockkit.absorbing.executor import reference
from blockkit.absorbing.request import Request
from blockkit.checkpoint.folder import open_folder, write_folder
from blockkit.checkpoint.model import open_model
from blockkit.cli.main import main
from blockkit.errors import BadInput, BlockkitError, ExactnessLost, NotPatchable
from blockkit.graph.changes import MatrixChange, VectorChange, dense
from blockkit.patch import in_place
from blockkit.patch import peft as adapter
from blockkit.patch.peft import export_peft

torch = pytest.importorskip("torch", reason="PyTorch is needed to load an adapter")
pytest.importorskip("peft", reason="peft is needed to load an adapter")

CONTEXT = 9
IDS = some_ids(14)
LIMIT = 1e-5  # of a logit, float32; they are of order 3, and the patch changes them by 0.4 and more
NEW_PROCESS = """if True:
    import sys
    import numpy as np, peft, torch, transformers
    for job in sys.argv[1:]:
        base, adapter, ids, out = job.split(":")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
        query, positions = torch.tensor(np.load(ids))
        with torch.no_grad():
            found = model(input_ids=query[None], position_ids=positions[None]).logits[0]
        np.save(out, found.numpy())"""


class Case(NamedTuple):
    path: Path  # the checkpoint
    patch: Patch
    contextual: np.ndarray  # logits of the query's tokens, as the class has them


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str | Path
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["blockkit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), *capsys.readouterr()


def without_prefix(pair: Pair, path: Path) -> Path:
    """The checkpoint as the published GPT-2 is: nothing before `h.0`."""
    write_folder(open_folder(pair.path), path, {})
    tensors = load_file(path / "model.safetensors")
    short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(short, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """A `matrix` patch for all of the query's tokens, made by the kit from a checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    pairs = {"llama": make(folder / "llama", "llama", LLAMA), "gpt2": make(folder / "gpt2", "gpt2", GPT2)}
    pairs["gpt2 without prefix"] = Pair(pairs["gpt2"].theirs, without_prefix(pairs["gpt2"], folder / "short"))
    found = {}
    for name, pair in pairs.items():
        model = open_model(pair.path)
        absorbed = absorb(reference(model, "float32"), Request(IDS[:CONTEXT], IDS[CONTEXT:], "all"), "matrix")
        whole = pair.logits(IDS, np.arange(len(IDS)))
        found[name] = Case(pair.path, Patch.of(absorbed, model, "float32"), whole[CONTEXT:])
    return found


def test_peft_gives_the_contextual_logits_in_a_new_process(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "ids.npy", np.stack([IDS[CONTEXT:], np.arange(CONTEXT, len(IDS))]))
    jobs = []
    for number, case in enumerate(cases.values()):
        case.patch.save(tmp_path / "p")
        lora, out = tmp_path / f"lora{number}", tmp_path / f"{number}.npy"
        done = run(
            monkeypatch, capsys, "export", "--patch", tmp_path / "p", "--out", lora, "--model", case.path, "--json"
        )
        assert done[0] == 0 and done[1].count("\n") == 1
        result = json.loads(done[1])
        assert set(result["ranks"].values()) == {len(IDS) - CONTEXT} and result["out"] == str(lora)
        assert result["position_ids"] == [[9, 10, 11, 12, 13]] and result["fan_in_fan_out"] is bool(number)
        measured = result["measured"]
        assert measured["reloaded_linf"] <= LIMIT and measured["unpatched_linf"] > 0.1 and measured["top1_agree"] == 1
        jobs.append(f"{case.path}:{lora}:{tmp_path / 'ids.npy'}:{out}")
    python("-c", NEW_PROCESS, *jobs, home=tmp_path)
    for number, case in enumerate(cases.values()):
        assert np.abs(np.load(tmp_path / f"{number}.npy") - case.contextual).max() <= LIMIT


def test_the_factors_are_in_the_file_as_they_are(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patch = cases["gpt2"].patch
    patch.save(tmp_path / "p")
    status, out, _ = run(monkeypatch, capsys, "export", "--patch", tmp_path / "p", "--out", tmp_path / "lora")
    assert status == 0 and "not compared with the model" in out and patch.validity in out
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for layer in range(3):
        change = patch.changes[f"layers.{layer}.attention.o_proj"]
        assert isinstance(change, MatrixChange)
        for key, factor in (("lora_A", change.right), ("lora_B", change.left.T)):
            found = tensors.pop(f"base_model.model.transformer.h.{layer}.attn.c_proj.{key}.weight")
            assert found.dtype == np.float32 and np.array_equal(found, factor)
    assert not tensors


# -- a model of one's own, in memory -----------------------------------------------------------------


class Inner(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(8, 8)


class Own(torch.nn.Module):
    """Modules whose paths end alike, which `peft` would take for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.inner = torch.nn.Embedding(VOCABULARY, 8), torch.nn.Linear(8, 8), Inner()
        self.inner_fc, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, VOCABULARY)
        self.free = torch.nn.Parameter(torch.ones(8))

    def forward(self, ids: Any) -> Any:
        x = self.embed(ids)
        x = x + torch.tanh(self.fc(x)) + torch.tanh(self.inner.fc(x)) * self.free
        return self.head(x + torch.tanh(self.inner_fc(x)))


def own_patch(**ranks: int) -> Patch:
    rng = np.random.default_rng(2)
    changes = {}
    for name, rank in ranks.items():
        left, right = (rng.normal(size=(rank, 8)).astype(np.float32) for _ in range(2))
        changes[f"{name.replace('__', '.')}.weight"] = MatrixChange(left, right)
    made_for = {"architecture": "Own", "weights": "0"}
    return Patch(changes, made_for, "matrix", "all", 3, (4, 5, 6), "float32", {"linf": 0.0})


OWN = own_patch(fc=3, inner__fc=1, inner_fc=2)


class Asked:
    """Stands for the backend of PyTorch models, of which only `check` is asked."""

    def check(self, patch: Patch, model: Any) -> None:
        if patch.made_for["architecture"] != type(model).__name__:
            raise BadInput("made for another model")


asked = Asked()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Own:
    entry = EntryPoint("torch", f"{__name__}:asked", in_place.GROUP)
    monkeypatch.setattr(in_place, "entry_points", lambda group: [entry])
    torch.manual_seed(1)
    found = Own()
    found.fc.weight.requires_grad_(False)
    return found


def state(model: Any) -> list[Any]:
    values = [(name, id(p), p.requires_grad, p.detach().numpy().tobytes()) for name, p in model.named_parameters()]
    return [values, [(name, type(m), m.training) for name, m in model.named_modules()]]


def test_a_model_in_memory_is_compared_with_and_left_alone(model: Own, tmp_path: Path) -> None:
    before = state(model)
    found = export_peft(OWN, tmp_path / "lora", model)
    assert state(model) == before
    assert found.ranks == {"fc": 3, "inner.fc": 1, "inner_fc": 2}
    with torch.no_grad():
        ids = torch.tensor([[4, 5, 6]])
        unpatched = model(ids)
        for path in found.ranks:
            weight = model.get_submodule(path).weight
            weight.copy_(torch.tensor(dense(weight.numpy(), OWN.changes[f"{path}.weight"])))
        effect = float((model(ids) - unpatched).abs().max())
    assert found.measured is not None and found.measured["reloaded_linf"] <= 1e-6 * effect
    assert found.measured["unpatched_linf"] == pytest.approx(effect, rel=1e-6)


def doubled(patch: Patch, changes: Any, base: Any) -> dict[str, Any]:
    return {**CONFIG(patch, changes, base), "lora_alpha": 6}


def misnamed(patch: Patch, changes: Any) -> bytes:
    return WEIGHTS(patch, {path.replace("inner", "outer"): change for path, change in changes.items()})


CONFIG, WEIGHTS = adapter._config, adapter._weights
FAULTS: dict[str, tuple[str, Any, str]] = {
    "another scale": ("_config", doubled, "off by"),
    "a key that peft ignores": ("_weights", misnamed, "does not find the adapter's .*outer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_adapter_is_noticed(fault: str, model: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong, message = FAULTS[fault]
    monkeypatch.setattr(adapter, name, wrong)
    before = state(model)
    with pytest.raises(ExactnessLost, match=message):
        export_peft(OWN, tmp_path / "lora", model)
    assert state(model) == before and not list(tmp_path.iterdir())


WRONG_MODELS: dict[str, tuple[Patch, type[BlockkitError], str]] = {
    "made for another": (replace(OWN, made_for={"architecture": "Other"}), BadInput, "made for another model"),
    "no such module": (own_patch(lost=1), BadInput, "no module lost"),
    "another shape": (own_patch(head=1), BadInput, r"head has the shape \(8, 8\), the model's is \(61, 8\)"),
    "a checkpoint's": (replace(OWN, tensors={s: s for s in OWN.changes}), BadInput, "give that checkpoint's path"),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_a_model_that_is_not_the_patchs(name: str, model: Own, tmp_path: Path) -> None:
    patch, kind, message = WRONG_MODELS[name]
    with pytest.raises(kind, match=message):
        export_peft(patch, tmp_path / "lora", model)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_not_the_patchs(cases: dict[str, Case], tmp_path: Path) -> None:
    patch = cases["llama"].patch
    for path, message in ((cases["gpt2"].path, "this model is gpt2"), (tmp_path / "none", "does not exist")):
        with pytest.raises(BadInput, match=message):
            export_peft(patch, tmp_path / "lora", path)
    assert not list(tmp_path.iterdir())


# -- refused -----------------------------------------------------------------------------------------

VECTOR = VectorChange(np.ones(8, np.float32))
ROW = MatrixChange(np.ones((3, 8), np.float32), np.ones((3, 8), np.float32), True)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a norm": ({"changes": {**OWN.changes, "norm.weight": VECTOR}}, 'vector norm.weight; .*strategy="matrix"'),
    "values for each token": ({"changes": {"fc.weight": ROW}, "tokens": "each"}, "fc.weight has its own values"),
    "one expert": ({"changes": {"experts.down.weight[3]": OWN.changes["fc.weight"]}}, "one slice of a stacked"),
    "no module's weight": ({"changes": {"experts.down": OWN.changes["fc.weight"]}}, "experts.down is no module's"),
    "part of a weight": ({"tensors": {}}, "fc.weight is not the whole of one weight"),
    "nothing": ({"changes": own_patch(fc=0).changes}, "changes nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_lora_cannot_carry(name: str, tmp_path: Path) -> None:
    facts, message = REFUSED[name]
    with pytest.raises(NotPatchable, match=message):
        export_peft(replace(OWN, **facts), tmp_path / "lora")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    export_peft(OWN, tmp_path / "lora")
    before = {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()}
    with pytest.raises(BadInput, match="nothing is ever overwritten"):
        export_peft(own_patch(fc=1), tmp_path / "lora")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["lora"] and len(before) == 3


def test_an_unknown_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, message = run(monkeypatch, capsys, "export", "--patch", "p", "--out", tmp_path / "x", "--format", "onnx")
    assert status == 2 and "--format 'onnx' is not known; allowed are peft" in message


# -- what others load -------------------------------------------------------------------------------


def in_memory(**options: Any) -> Any:
    import transformers

    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8, **options)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def absorbed(model: Any) -> Patch:
    from blockkit.backends.pytorch import absorb as absorb_in_place

    ids = torch.as_tensor(np.array([some_ids(12)])) % 61
    held = ["*lora_*"] if hasattr(model, "peft_config") else []
    return absorb_in_place(model, ids[:, :9], ids[:, 9:], tokens="all", strategy="matrix", freeze=held)


@pytest.mark.parametrize("target", ["down_proj", "o_proj", "up_proj"])
def test_a_patch_of_a_peft_model_has_the_names_of_its_base(target: str, tmp_path: Path) -> None:
    import peft

    model = peft.get_peft_model(in_memory(), peft.LoraConfig(target_modules=[target], init_lora_weights=False)).eval()
    patch = absorbed(model)
    found = export_peft(patch, tmp_path / "adapter", model)
    assert found.measured is not None and found.measured["reloaded_linf"] < LIMIT < found.measured["unpatched_linf"]
    base = dict(in_memory().named_modules())
    assert set(found.ranks) <= base.keys()
    assert "put them on it beside this one" in (tmp_path / "adapter" / "README.md").read_text()


def test_an_adapter_is_not_changed_by_another(tmp_path: Path) -> None:
    change = MatrixChange(np.ones((1, 4), np.float32), np.ones((1, 8), np.float32))
    slot = "base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight"
    made = {"architecture": "m", "weights": "0"}
    patch = Patch({slot: change}, made, "matrix", "last", 5, (7,), "float32", {})
    with pytest.raises(NotPatchable, match=r"is part of an adapter \(lora_A\).*freeze="):
        export_peft(patch, tmp_path / "adapter")


def test_auto_peft_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    model = in_memory()
    model.config._name_or_path = "someone/small"
    patch = absorbed(model)
    export_peft(patch, tmp_path / "adapter", model)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "someone/small")
    model.save_pretrained(tmp_path / "someone" / "small")  # where that name leads
    monkeypatch.chdir(tmp_path)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"), dtype=torch.float32).eval()
    query, positions = torch.as_tensor(patch.query_ids), torch.as_tensor(patch.position_ids)
    with torch.no_grad(), patch.applied(model):
        wanted = model(query, position_ids=positions).logits
    with torch.no_grad():
        assert (loaded(input_ids=query, position_ids=positions).logits - wanted).abs().max() < LIMIT


@pytest.mark.parametrize(
    "name", ["/home/somebody/private", "~/private", "./private", "../x", "a/b/c", "here/it-is", ""]
)
def test_no_private_path_is_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "it-is").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = in_memory()
    model.config._name_or_path = name
    export_peft(absorbed(model), tmp_path / "adapter", model)
    written = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert json.loads(written)["base_model_name_or_path"] is None and (not name or name not in written)
    assert "the model has no public name" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_task_is_named_only_where_the_model_has_it(tmp_path: Path) -> None:
    from blockkit.backends.pytorch.editing.reload import causal_head

    whole = in_memory()
    assert causal_head(whole) and not causal_head(whole.model)
    export_peft(absorbed(whole), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] is config["base_model_name_or_path"] is None
    assert "no model was given" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_patch_of_a_model_in_memory_is_not_merged_into_a_checkpoint(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absorbed(in_memory()).save(tmp_path / "patch.safetensors")
    words = "apply", "--model", cases["llama"].path, "--patch", tmp_path / "patch.safetensors", "--out", tmp_path / "x"
    status, _, said = run(monkeypatch, capsys, *words)
    assert status == 2 and "made on a model in memory" in said and "save_pretrained" in said
