"""The command line as a new user meets it: what is wrong ends in one message and its exit status."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import with_tokenizer
from command_line import RUN, CommandLine
from conformance import tiny_model
from processes import HANGS

import blockkit as bk
from blockkit.absorbing import backends as opening

TEXTS = ("--context", "w1 w2 w3", "--query", "w4 w5")
LONG_NAME = "x" * 300


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer("gemma3_text", tmp_path_factory.mktemp("models") / "gemma")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def patch(cli: CommandLine, gemma: Path, tmp_path: Path) -> Path:
    path = tmp_path / "patch.safetensors"
    assert cli.absorb(gemma, *TEXTS, "--out", path).status == 0
    return path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- asking ------------------------------------------------------------------------------------------

SPEC = """\
name: s
width: 8
block:
  nodes:
    mixed: {component: mix, input: x}
    v: {component: add, inputs: [x, mixed]}
    norm: {component: rms_norm, input: v}
    mlp: {component: linear, input: norm, out: 8}
    y: {component: add, inputs: [v, mlp]}
  output: y
"""


def test_check_as_json(cli: CommandLine) -> None:
    done = cli("check", "gemma3-270m", "--json")
    verdict = done.json
    assert done.status == 0 and done.err == ""
    assert verdict.keys() == {"patchable", "capacity", "routes", "obstructions", "blocking", "changes"}
    assert verdict["patchable"] is True and verdict["capacity"] == 1024 and verdict["obstructions"] == []
    keys = {"parameters", "capacity", "conditions", "source", "derivation"}
    assert all(r.keys() == keys for r in verdict["routes"])


def test_a_no_is_status_1(cli: CommandLine) -> None:
    done = cli("check", "gemma3-270m", "--only", "mlp.*", "--json")
    assert done.status == 1 and done.json["patchable"] is False
    assert all(o.keys() == {"node", "reason"} for o in done.json["obstructions"]) and done.json["obstructions"]
    assert cli("check", "gemma3-270m", "--only", "mlp.*").out.startswith("not patchable")


def test_unknown_is_null_and_status_1(cli: CommandLine, tmp_path: Path) -> None:
    relu = "{component: mlp, input: norm, hidden: 32, activation: relu}"
    (tmp_path / "s.yaml").write_text(SPEC.replace("{component: linear, input: norm, out: 8}", relu))
    done = cli("check", "s.yaml", "--only", "mlp.down_proj", "--json")
    assert done.status == 1 and done.json["patchable"] is None and done.json["obstructions"]
    done = cli("check", "gemma3-270m", "--tokens", "1000000", "--json")
    assert done.status == 1 and done.json["patchable"] is not True and done.json["obstructions"]


def test_plan_as_json(cli: CommandLine) -> None:
    plan = cli("plan", "gemma3-270m", "--strategy", "paper", "--json").json
    assert plan["strategy"] == "paper" and isinstance(plan["numbers_stored"], int)
    keys = {"parameter", "law", "formula", "rank", "conditions", "source"}
    assert plan["steps"] and all(keys <= step.keys() for step in plan["steps"])
    assert cli("plan", "gemma3-270m", "--only", "mlp.*").status == 1


def test_list_and_schema_are_one_object(cli: CommandLine) -> None:
    names = [a["name"] for a in cli("list", "--json").json["architectures"]]
    assert "gemma3-270m" in names and "llama-7b" in names
    assert json.loads(cli("schema").out)["type"] == "object"


def test_python_has_the_keys_of_the_json() -> None:
    verdict, plan = bk.check("gemma3-270m"), bk.plan("gemma3-270m")
    assert verdict.capacity == 1024 and verdict.patchable is True and verdict.obstructions == ()
    assert {"parameters", "capacity", "conditions", "source"} <= set(dir(verdict.routes[0]))
    assert {"strategy", "steps", "numbers_stored"} <= set(dir(plan))
    assert {"parameter", "law", "formula", "rank", "conditions", "source"} <= set(dir(plan.steps[0]))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("lama-7b",), "did you mean 'llama-7b'"),
        (("",), "empty"),
        (("  ",), "empty"),
        (("no.yaml",), "no such file: no.yaml"),
        (("specs/design",), "no such file: specs/design"),
        (("folder",), "write hf:folder"),
        ((LONG_NAME + ".yaml",), "name too long"),
        (("hf:missing",), "no config.json at missing"),
        (("hf:folder",), "no config.json at folder"),
        (("hf:t5.json",), "model_type 't5' is not supported; supported are"),
        (("hf:binary.json",), "not text"),
        (("hf:" + LONG_NAME,), "name too long"),
        (("binary.json",), "not text"),
        (("broken.yaml",), "broken.yaml, line 6, column 1: malformed YAML"),
        (("broken.json",), "broken.json, line 1, column 15: malformed JSON"),
        (("shape.yaml",), "block.nodes.y: node 'y': add takes arguments of one width, got [8], [6]"),
        (("kind.yaml",), "kind.yaml, line 8, column 5, block.nodes.mlp: unknown component 'liner'"),
        (("empty.yaml",), "expected a mapping"),
        (("gemma3-270m", "--only", "zzz.*"), "'zzz.*' matches no parameter; there are"),
        (("gemma3-270m", "--tokens", "0"), "tokens must be at least 1, got 0"),
        (("gemma3-270m", "--tokens", "-3"), "tokens must be at least 1, got -3"),
    ],
)
@pytest.mark.parametrize("command", ["check", "plan"])
def test_a_spec_that_is_wrong(
    cli: CommandLine, tmp_path: Path, command: str, words: tuple[str, ...], wanted: str
) -> None:
    (tmp_path / "folder").mkdir()
    files = {
        "t5.json": '{"model_type": "t5"}',
        "broken.yaml": "name: x\nwidth: 4\nblock:\n  nodes: {a: [1,\n  output: y\n",
        "broken.json": '{"name": "x", }',
        "shape.yaml": SPEC.replace("out: 8", "out: 6"),
        "kind.yaml": SPEC.replace("linear", "liner"),
        "empty.yaml": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert wanted in cli.refused(command, *words)


def test_wrong_words(cli: CommandLine) -> None:
    assert "allowed are paper" in cli.refused("plan", "gemma3-270m", "--strategy", "foo")
    assert "allowed are paper" in cli.refused("plan", "gemma3-270m", "--strategy", "")
    for words in (
        ("check", "gemma3-270m", "--tokens", "many"),
        ("frobnicate",),
        ("check",),
        ("list", "--frob"),
        ("absorb",),
    ):
        done = cli(*words)
        assert done.status == 2 and done.out == "" and "Error: " in done.err and "Traceback" not in done.err


def test_the_catalogue_comes_before_the_current_folder(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    assert cli("check", "llama").status == 0


# -- absorbing ---------------------------------------------------------------------------------------


def test_absorb_as_json(cli: CommandLine, gemma: Path, tmp_path: Path) -> None:
    first, second = (cli.absorb(gemma, *TEXTS, "--json", "--out", "p.safetensors") for _ in range(2))
    assert first.status == second.status == 0 and "absorbing" in first.err
    keys = {"tokens", "unpatched_linf", "linf", "tvd", "top1_agree", "floor_linf", "residual_by_block", "plan"}
    found = first.json
    assert keys | {"seconds"} <= found.keys() and found["tokens"] == 1 and len(found["residual_by_block"]) == 3
    assert found["linf"] < 1e-5 < found["unpatched_linf"]
    again = second.json
    assert all(found[key] == again[key] for key in found.keys() - {"seconds"})
    assert names(tmp_path) == ["p.safetensors"]


def test_text_from_a_file(cli: CommandLine, gemma: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("w1 w2 w3\n")
    done = cli.absorb(gemma, "--context", "@notes.txt", "--query", "w4", "--json")
    assert done.json["context_tokens"] == 3


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--context", "", "--query", "w1"), "--context is empty"),
        (("--context", " \n", "--query", "w1"), "--context is empty"),
        (("--context", "w1", "--query", ""), "--query is empty"),
        (("--context", "w1", "--query", "  "), "the query is empty"),
        (("--context", "@missing", "--query", "w1"), "--context @missing: cannot read the file: No such file"),
        (("--context", "@folder", "--query", "w1"), "Is a directory"),
        (("--context", "@", "--query", "w1"), "Is a directory"),
        (("--context", "@binary", "--query", "w1"), "not text (UTF-8)"),
        (("--context", "\udcff", "--query", "w1"), "--context is not text (UTF-8)"),
        (("--context", "@empty", "--query", "w1"), "--context @empty is empty"),
        (("--context", "w1 " * 64, "--query", "w1"), "65 tokens together; the model's window is 64"),
        ((*TEXTS, "--tokens", "0"), "--tokens '0' is not known; allowed are last, each, all"),
        ((*TEXTS, "--tokens", "-3"), "--tokens '-3' is not known"),
        ((*TEXTS, "--tokens", "many"), "--tokens 'many' is not known"),
        ((*TEXTS, "--strategy", "foo"), "--strategy 'foo' is not known; allowed are paper"),
        ((*TEXTS, "--strategy", ""), "--strategy '' is not known"),
        ((*TEXTS, "--dtype", "int8"), "--dtype 'int8' is not known; allowed are float32"),
        ((*TEXTS, "--backend", "foo"), "--backend 'foo' is not known; allowed are jax, numpy"),
        ((*TEXTS, "--backend", ""), "--backend '' is not known"),
        ((*TEXTS, "--out", "folder"), "is a folder; give a file"),
        ((*TEXTS, "--out", "missing/p"), "cannot write into the folder missing"),
        ((*TEXTS, "--out", "empty/p"), "cannot write into the folder empty"),
        ((*TEXTS, "--out", os.devnull), "is not an ordinary file"),
        ((*TEXTS, "--out", LONG_NAME), "name too long"),
    ],
)
def test_a_request_that_is_wrong(
    cli: CommandLine, gemma: Path, tmp_path: Path, words: tuple[str, ...], wanted: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert wanted in cli.refused("absorb", "--model", gemma, "--backend", "numpy", *words)
    assert names(tmp_path) == ["binary", "empty", "folder"]


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("missing", "does not exist. Allowed are"),
        ("", "name is empty"),
        (" ", "name is empty"),
        ("~nobody-of-that-name/m", "home"),
        ("text.txt", "is a file of another kind"),
        ("folder", "has no config.json"),
        ("text.gguf", "is not a GGUF file"),
        ("cut.gguf", "is truncated"),
        ("untokenized", "has no tokenizer.json"),
        (LONG_NAME, "name too long"),
    ],
)
def test_a_model_that_is_wrong(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, wanted: str
) -> None:
    monkeypatch.setenv("BLOCKKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x09" + b"\x00" * 7)
    if model == "untokenized":
        tiny_model("llama", tmp_path / model)
    assert wanted in cli.refused("absorb", "--model", model, "--backend", "numpy", *TEXTS)
    assert not list(tmp_path.glob("cache/models/*"))


def test_a_tokenizer_of_another_model(cli: CommandLine, tmp_path: Path) -> None:
    model = with_tokenizer("llama", tmp_path / "model", words=90)
    assert "token id is 81; it must be from 0 to 49" in cli.refused(
        "absorb", "--model", model, "--backend", "numpy", "--context", "w80", "--query", "w1"
    )


def test_a_cache_that_cannot_be_written(cli: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "m.gguf").write_text("hello")
    monkeypatch.setenv("BLOCKKIT_CACHE", str(tmp_path / "file" / "cache"))
    assert "Set BLOCKKIT_CACHE to a folder" in cli.refused("absorb", "--model", "m.gguf", "--backend", "numpy", *TEXTS)


@pytest.mark.parametrize("backend", ["jax", "tensorflow", "torch"])
def test_a_framework_that_is_missing(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, llama: Path, backend: str
) -> None:
    for name in [n for n in sys.modules if n == "blockkit.backends.keras" or n.startswith("blockkit.backends.keras.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "keras", None)
    message = cli.refused("absorb", "--model", llama, *TEXTS, "--backend", backend)
    assert f'pip install "blockkit-patch[{backend}]"' in message


def test_a_third_partys_backend_that_is_missing(cli: CommandLine, monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    entry = opening.EntryPoint("other", "no_such_module_at_all:open", opening.GROUP)
    monkeypatch.setattr(opening, "entry_points", lambda group: [entry])
    message = cli.refused("absorb", "--model", llama, *TEXTS, "--backend", "other")
    assert "no_such_module_at_all" in message and "blockkit-patch[other]" not in message


# -- patches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["last", "each", "all"])
def test_patches_survive_a_round_trip(cli: CommandLine, gemma: Path, tmp_path: Path, mode: str) -> None:
    assert cli.absorb(gemma, *TEXTS, "--tokens", mode, "--out", "first").status == 0
    loaded = bk.Patch.load("first")
    loaded.save(tmp_path / "second")
    again = bk.Patch.load(tmp_path / "second")
    assert again.tokens == mode and again.context_length == 3 and again.changes.keys() == loaded.changes.keys()
    for fact in ("made_for", "strategy", "tokens", "context_length", "query", "dtype", "measured"):
        assert getattr(again, fact) == getattr(loaded, fact)
    assert loaded.position_ids.tolist() == [[3, 4]]
    for slot, change in loaded.changes.items():
        for name, value in vars(change).items():
            assert np.array_equal(value, getattr(again.changes[slot], name))


def test_a_patch_can_be_read_by_others(patch: Path, tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    assert patch.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_apply_as_json(cli: CommandLine, gemma: Path, patch: Path, tmp_path: Path) -> None:
    done = cli("apply", "--model", gemma, "--patch", patch, "--out", "edited", "--json")
    assert done.status == 0 and done.json["position_ids"] == [3, 4] and done.json["changed"]
    assert names(tmp_path) == ["edited", "patch.safetensors"]
    assert names(tmp_path / "edited") == ["config.json", "model.safetensors", "tokenizer.json"]
    before = {p.name: p.read_bytes() for p in (tmp_path / "edited").iterdir()}
    again = cli.refused("apply", "--model", gemma, "--patch", patch, "--out", "edited")
    assert "nothing is ever overwritten" in again
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "edited").iterdir()}
    assert "other weights" in cli.refused("apply", "--model", "edited", "--patch", patch, "--out", "twice")


def test_apply_where_nothing_can_be_written(cli: CommandLine, gemma: Path, patch: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot write" in cli.refused("apply", "--model", gemma, "--patch", patch, "--out", "file/out")
    assert "exists" in cli.refused("apply", "--model", gemma, "--patch", patch, "--out", "file")
    assert names(tmp_path) == ["file", "patch.safetensors"]


def test_a_patch_for_every_token_is_not_merged(cli: CommandLine, gemma: Path, tmp_path: Path) -> None:
    assert cli.absorb(gemma, *TEXTS, "--tokens", "each", "--out", "p").status == 0
    message = cli.refused("apply", "--model", tmp_path / "never looked at", "--patch", "p", "--out", "out")
    assert "different values for every token; it cannot be merged" in message


def test_apply_says_what_it_proved_or_that_it_proved_nothing(cli: CommandLine, gemma: Path, patch: Path) -> None:
    done = cli("apply", "--model", gemma, "--patch", patch, "--out", "edited", "--json")
    assert (
        done.json["proved"] is True and done.json["linf"]["float64"] <= 1e-4 and done.json["floor_dtype"] == "float32"
    )
    shutil.copytree(gemma, "other")
    with Path("other/model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x3e")
    words = ("apply", "--model", "other", "--patch", patch, "--out", "out", "--json")
    assert "--allow-other-weights" in cli.refused(*words[:-1])
    done = cli(*words, "--allow-other-weights")
    assert done.status == 0 and done.json["proved"] is False and done.json["linf"] is None
    assert done.json["validity"].startswith("not proved on these weights")


def test_a_patch_for_another_model(cli: CommandLine, llama: Path, patch: Path) -> None:
    message = cli.refused("apply", "--model", llama, "--patch", patch, "--out", "out")
    assert "made for gemma3, this model is llama" in message


def damaged(source: Path, header: dict[str, Any] | None = None, **tensors: Any) -> None:
    """Writes the patch `bad` with some of its header's facts or tensors replaced."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    from blockkit.patch.file import digest

    with safe_open(source, framework="np") as file:
        metadata = dict(file.metadata())
    facts = {**json.loads(metadata["patch"]), **(header or {})}
    metadata, numbers = {**metadata, "patch": json.dumps(facts)}, {**load_file(source), **tensors}
    save_file(numbers, "bad", {**metadata, "sha256": digest(metadata, numbers)})  # made on purpose, to be read


LEFT = "layers.0.mlp.down_proj.left"


def test_a_patch_that_is_damaged(cli: CommandLine, gemma: Path, patch: Path) -> None:
    faults: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"tokens": "some"}, {}, "damaged"),
        ({"context_length": "x"}, {}, "damaged"),
        ({"query": 5}, {}, "damaged"),
        ({"made_for": None}, {}, "damaged"),
        ({"more": 1}, {}, "damaged"),
        ({}, {LEFT: np.full((1, 24), np.nan, np.float32)}, "damaged"),
        ({}, {LEFT: np.zeros((1, 24), np.int32)}, "damaged"),
        ({}, {LEFT: np.zeros((2, 24), np.float32)}, "damaged"),
        ({}, {"nameless": np.zeros(1, np.float32)}, "damaged"),
        ({}, {LEFT: np.zeros((1, 23), np.float32)}, "has the shape"),
        ({}, {"layers.9.norm.scale.delta": np.zeros(24, np.float32)}, "does not have"),
    ]
    for header, tensors, wanted in faults:
        damaged(patch, header, **tensors)
        assert wanted in cli.refused("apply", "--model", gemma, "--patch", "bad", "--out", "out")
        assert not Path("out").exists()


def test_a_patch_that_is_none(cli: CommandLine, gemma: Path, patch: Path, tmp_path: Path) -> None:
    whole = patch.read_bytes()
    (tmp_path / "head").write_bytes(whole[:500])
    (tmp_path / "most").write_bytes(whole[:-10])
    (tmp_path / "text").write_text("hello, this is no patch")
    for name, wanted in (
        ("head", "not a readable safetensors"),
        ("most", "not a readable safetensors"),
        ("text", "not a readable safetensors"),
        ("missing", "no patch file at missing"),
        (".", "no patch file at"),
        (LONG_NAME, "name too long"),
        (str(gemma / "model.safetensors"), "is not a patch of format 1"),
    ):
        assert wanted in cli.refused("apply", "--model", gemma, "--patch", name, "--out", "out")


# -- processes ---------------------------------------------------------------------------------------


def interrupted(stage: str, *words: str | Path) -> tuple[int, str]:
    """Ctrl-C at a stage that is made to last; gives the status and what stderr said after it."""
    slow = f"""
import blockkit.checkpoint.folder as folder, blockkit.absorbing.measure as measure, shutil, time, sys
def linger(*args, **kwargs):
    print("lingering", file=sys.stderr, flush=True)
    time.sleep(600)
{stage} = linger
from blockkit.cli.main import main
main()
"""
    call = [sys.executable, "-c", slow, *map(str, words)]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if line == "lingering\n":
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=HANGS)
    assert out == ""
    return process.returncode, err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c(gemma: Path, patch: Path, tmp_path: Path) -> None:
    absorb = ("absorb", "--model", gemma, "--backend", "numpy", *TEXTS, "--out", tmp_path / "new")
    apply = ("apply", "--model", gemma, "--patch", patch, "--out", tmp_path / "edited")
    for stage, words in (("measure.compare", absorb), ("shutil.copyfile", apply)):
        assert interrupted(stage, *words) == (130, "error: interrupted; nothing was left half-written\n")
        assert names(tmp_path) == [patch.name]


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_reader_that_has_seen_enough() -> None:
    for words, status in ((("list",), 0), (("schema",), 0), (("check", "gemma3-270m", "--only", "mlp.*"), 1)):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run([*RUN, *words], stdout=writing, stderr=subprocess.PIPE, text=True)
        os.close(writing)
        assert (done.returncode, done.stderr) == (status, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*RUN, "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder here that even root cannot write to")
def test_a_current_folder_that_cannot_be_written(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, gemma: Path, patch: Path
) -> None:
    monkeypatch.chdir("/proc")
    assert cli("check", "gemma3-270m").status == 0
    assert cli.absorb(gemma, *TEXTS).status == 0
    assert "cannot write into the folder" in cli.refused("absorb", "--model", gemma, *TEXTS, "--out", "p")
    assert "cannot write" in cli.refused("apply", "--model", gemma, "--patch", patch, "--out", "out")


def test_a_terminal_that_cannot_show_it(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SPEC.replace("mlp", "größe"), encoding="utf-8")
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*RUN, "check", str(tmp_path / "s.yaml")], capture_output=True, env=env)
    assert done.returncode == 0 and rb"gr\xf6\xdfe" in done.stdout
