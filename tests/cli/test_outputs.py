# ruff: noqa: E501  (tables of cases)
"""What commands write: never over what they read, whole or not at all, whenever they are killed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")

from killing import RUN, digest, killed
from small_model import TEXTS, write_model

from blockkit.atomic import new_folder, write_file
from blockkit.checkpoint.model import open_model
from blockkit.cli.main import main
from blockkit.errors import BadInput
from blockkit.patch.patch import Patch

ABSORB = ("absorb", "--backend", "numpy", "--strategy", "matrix")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOCKKIT_CACHE", str(tmp_path / "cache"))

    def run(*words: str | Path, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["blockkit", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


# -- outputs that are inputs -------------------------------------------------------------------------


def links(tmp_path: Path, model: Path) -> dict[str, Path]:
    """Names under which the model's weights, or a place beside them, can be reached."""
    (tmp_path / "soft").symlink_to(model / "model.safetensors")
    os.link(model / "model.safetensors", tmp_path / "hard")
    (tmp_path / "there").symlink_to(model)
    return {
        "itself": model / "model.safetensors", "new beside it": model / "new.safetensors",
        "a soft link": tmp_path / "soft", "a hard link": tmp_path / "hard",
        "through a linked folder": tmp_path / "there" / "new.safetensors",
        "by dots": tmp_path / "model" / ".." / "model" / "config.json",
    }  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="POSIX links")
def test_no_output_is_an_input(call: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("w1 w2 w3")
    assert call(*ABSORB, "--model", model, *TEXTS, "--out", "patch")[0] == 0
    (tmp_path / "s.yaml").write_text(
        "name: a\nwidth: 4\nblock:\n  nodes: {y: {component: mlp, input: x, hidden: 8}}\n  output: y\n"
    )
    (tmp_path / "linked.npz").symlink_to("s.yaml")
    names, before = links(tmp_path, model), None
    for name in names.values():
        before = digest(model)
        status, _, err = call(*ABSORB, "--model", model, *TEXTS, "--out", name)
        assert status == 2 and "is read" in err, (name, err)
        for kind in (".json", ".png"):
            option = "--metrics" if kind == ".json" else "--plot"
            place = model / f"new{kind}" if kind == ".png" else model / "config.json"
            assert "is read" in call("generate", "--model", model, "--prompt", "w1 w2", option, place)[2]
        assert digest(model) == before
    for words in (
        (*ABSORB, "--model", model, "--context", "@text", "--query", "w1", "--out", "text"),
        (*ABSORB, "--model", model, "--context", "w1", "--query", "@text", "--out", tmp_path / "model" / ".." / "text"),
        ("apply", "--model", model, "--patch", "patch", "--out", model / "inside"),
        ("export", "--model", model, "--patch", "patch", "--out", model / "inside"),
        ("export", "--patch", "patch", "--out", "patch"),
        ("verify", "s.yaml", "--dump", "s.yaml"),
        ("verify", "s.yaml", "--dump", "linked.npz"),
    ):
        before = (
            (tmp_path / "text").read_text() + digest(tmp_path / "patch") + digest(tmp_path / "s.yaml") + digest(model)
        )
        status, _, err = call(*words)
        assert status == 2 and "is read" in err, (words, err)
        assert before == (tmp_path / "text").read_text() + digest(tmp_path / "patch") + digest(
            tmp_path / "s.yaml"
        ) + digest(model)


def test_a_plot_does_not_take_the_patchs_place(call: Any, model: Path, tmp_path: Path) -> None:
    assert call(*ABSORB, "--model", model, *TEXTS, "--out", "patch.svg")[0] == 0
    before = (tmp_path / "patch.svg").read_bytes()
    status, _, err = call("show", "patch.svg", "--plot", tmp_path / "patch.svg")
    assert status == 2 and "which is read" in err and (tmp_path / "patch.svg").read_bytes() == before


def test_another_place_is_fine(call: Any, model: Path, tmp_path: Path) -> None:
    assert call(*ABSORB, "--model", model, *TEXTS, "--out", tmp_path / "model.safetensors")[0] == 0
    assert call("apply", "--model", model, "--patch", "model.safetensors", "--out", "edited")[0] == 0
    open_model(tmp_path / "edited")


# -- texts -------------------------------------------------------------------------------------------


def query_of(call: Any, model: Path, *words: str, stdin: bytes = b"") -> tuple[int, ...]:
    status, _, err = call(*ABSORB, "--model", model, *words, "--out", "p", stdin=stdin)
    assert status == 0, err
    return Patch.load("p").query


def test_texts_come_from_standard_input_too(call: Any, model: Path, tmp_path: Path) -> None:
    wanted = query_of(call, model, "--context", "w1 w2", "--query", "w3 w4")
    assert query_of(call, model, "--context", "-", "--query", "w3 w4", stdin=b"w1 w2") == wanted
    assert query_of(call, model, "--context", "w1 w2", "--query", "-", stdin=b"\xef\xbb\xbfw3 w4") == wanted
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbfw3 w4")
    assert query_of(call, model, "--context", "w1 w2", "--query", "@bom") == wanted
    unknown = query_of(call, model, "--context", "w1 w2", "--query", "@@bom")
    assert unknown != wanted and len(unknown) == 2  # a literal @, and an unknown word
    for words, stdin, said in (
        (("--context", "-", "--query", "-"), b"w1", "standard input (-) can be read once"),
        (("--context", "-", "--query", "w1"), b"", "--context - is empty"),
        (("--context", "-", "--query", "w1"), b"\xff", "--context -: the file is not text"),
        (("--context", "@~nosuchuser/x", "--query", "w1"), b"", "cannot read the file"),
    ):
        status, _, err = call(*ABSORB, "--model", model, *words, stdin=stdin)
        assert status == 2 and said in err, err


@pytest.mark.parametrize("word", ["~nosuchuser/model", "~nosuchuser/m.gguf", "x" * 5000, "a\x00b"])
def test_a_model_of_no_possible_name(call: Any, word: str) -> None:
    status, _, err = call(*ABSORB, "--model", word, *TEXTS)
    assert status == 2 and err.startswith("error: the model") and err.count("\n") == 1


@pytest.mark.parametrize("out", ["~nosuchuser/x", "a\x00b", "x" * 5000])
def test_an_output_of_no_possible_name(call: Any, model: Path, out: str) -> None:
    assert call(*ABSORB, "--model", model, *TEXTS, "--out", "p")[0] == 0
    for words in (
        (*ABSORB, "--model", model, *TEXTS, "--out", out), ("apply", "--model", model, "--patch", "p", "--out", out),
        ("export", "--patch", "p", "--out", out), ("verify", "gpt2", "--dump", out),
    ):  # fmt: skip
        status, _, err = call(*words)
        assert status == 2 and "did not foresee" not in err and "Traceback" not in err, (words, err)


def test_no_escape_reaches_the_terminal(call: Any, tmp_path: Path) -> None:
    status, out, err = call("verify", "gpt2", "--dump", tmp_path / "\x1b[31mred.npz")
    assert status == 0 and r"\x1b[31mred.npz" in err and "\x1b" not in out + err


@pytest.mark.parametrize("locale", ["C", "POSIX", "en_US.ISO-8859-1"])
def test_output_is_utf_8_whatever_the_locale(tmp_path: Path, locale: str) -> None:
    (tmp_path / "größe.yaml").write_text("name: größe\nwidth: 4\nblock:\n  nodes:\n    m: {component: mix, input: x}\n    größe: {component: mlp, input: m, hidden: 8}\n  output: größe\n", encoding="utf-8")  # fmt: skip
    env = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env.pop("PYTHONIOENCODING", None)
    done = subprocess.run([*RUN, "check", os.fsencode(tmp_path / "größe.yaml")], capture_output=True, env=env)
    assert "größe" in done.stdout.decode("utf-8") and b"Traceback" not in done.stderr


# -- whole or not at all -----------------------------------------------------------------------------


def test_modes_and_links_are_kept(tmp_path: Path, model: Path) -> None:
    file, link = tmp_path / "f", tmp_path / "l"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to("f")
    write_file(link, b"new")
    assert link.is_symlink() and file.read_bytes() == b"new" and file.stat().st_mode & 0o777 == 0o640
    (model / "config.json").chmod(0o600)
    (model / "model.safetensors").chmod(0o400)
    from blockkit.checkpoint.folder import open_folder, write_folder

    opened = open_folder(model)
    write_folder(opened, tmp_path / "copy", {"model.norm.weight": opened.tensor("model.norm.weight") * 2})
    assert [(tmp_path / "copy" / n).stat().st_mode & 0o777 for n in ("config.json", "model.safetensors")] == [
        0o600,
        0o400,
    ]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="Linux")
def test_the_disk_has_it_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("os.fsync", lambda fd: done.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    monkeypatch.setattr(Path, "replace", lambda self, other: done.append("renamed"))
    write_file(tmp_path / "f", b"new")
    assert done[1:] == ["renamed", str(tmp_path)] and ".partial" in done[0]


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
def test_what_a_killed_run_left_is_swept_and_what_runs_is_not(tmp_path: Path) -> None:
    dead = [tmp_path / f".blockkit-{i:012x}.partial" for i in range(3)]
    dead[0].write_bytes(b"x")
    dead[1].mkdir()
    (dead[1] / "inner").write_bytes(b"x")
    (tmp_path / "precious").write_text("x")
    dead[2].symlink_to("precious")
    other = tmp_path / ".another.partial"
    other.touch()
    holding = f"from blockkit.atomic import scratch_folder; from pathlib import Path\nwith scratch_folder(Path({str(tmp_path)!r})) as f: print(f, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as alive:
        assert alive.stdout is not None
        held = Path(alive.stdout.readline().strip())
        assert not dead[0].exists() and not dead[1].exists()
        write_file(tmp_path / "f", b"new")
        assert held.is_dir() and other.exists() and (tmp_path / "precious").exists()
        alive.communicate("\n")
    with new_folder(tmp_path / "g"):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"f", "g", "precious", other.name, dead[2].name}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(BadInput, match="not an ordinary file"):
        write_file(tmp_path / "d", b"x")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(BadInput):
        write_file(tmp_path / "loop", b"x")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="Linux")
def test_killed_at_any_moment(tmp_path: Path) -> None:
    assert killed(16, int.from_bytes(os.urandom(2)), tmp_path) == []


def test_an_interruption_while_importing(tmp_path: Path) -> None:
    """The heavy imports run inside what is guarded: 130 and one line, whatever they make of it."""
    for raised in ("KeyboardInterrupt", "ImportError"):
        (tmp_path / "typer.py").write_text(
            f"import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\n    input()\nexcept KeyboardInterrupt:\n    raise {raised}\n"
        )
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run([*RUN, "list"], capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)
        assert (done.returncode, done.stderr) == (130, "error: interrupted; nothing was left half-written\n")


def test_an_interruption_where_nothing_can_be_raised(tmp_path: Path) -> None:
    """Python drops what is raised in a destructor; the command must still end, and say so in one line."""
    (tmp_path / "typer.py").write_text(
        "import os, signal, time\nclass Last:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(0.01)\nLast()\ntime.sleep(20)\nraise SystemExit(3)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*RUN, "list"], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (130, "error: interrupted; nothing was left half-written\n")


def test_a_fault_is_one_message(tmp_path: Path) -> None:
    """Also one that is no `Exception`, as a panic of a foreign library, and one while importing."""
    (tmp_path / "typer.py").write_text("class Panic(BaseException): pass\nraise Panic('\\x1b[31m')\n")
    done = subprocess.run(
        [*RUN, "list"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 70 and r"error: Panic: \x1b[31m" in done.stderr and "Traceback" not in done.stderr


def test_json_output_is_whole_on_a_full_disk() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*RUN, "list", "--json"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: cannot write the result")
        and done.stderr.count("\n") == 1
    )
    assert json.dumps(done.stderr)
