"""Commands killed at random moments: a file is the old one or the new one, and the next run sweeps what is left.

`python tests/cli/killing.py [COUNT] [SEED]` kills as many as one likes.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from small_model import TEXTS, write_model

RUN = [sys.executable, "-c", "from blockkit.cli.main import main; main()"]
WAYS = ("INT", "TERM", "KILL", "INT twice")


def digest(path: Path) -> str:
    """Of a file, or of all files of a folder with their names; empty where there is nothing."""
    if path.is_dir():
        return " ".join(f"{f.name} {digest(f)}" for f in sorted(path.iterdir()))
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


class Scene:
    """A model, a patch of it, and the commands that write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = write_model(folder / "model")
        absorb = ["absorb", "--model", str(model), "--backend", "numpy", "--strategy", "matrix", *TEXTS]
        self.run(absorb, "--out", str(folder / "patch"))
        (folder / "out").mkdir()
        base = ["--patch", str(folder / "patch"), "--out"]
        self.commands = {
            "absorb": ([*absorb, "--out"], "p"),
            "apply": (["apply", "--model", str(model), *base], "edited"),
            "export": (["export", *base], "adapter"),
            "save": (["verify", "gpt2", "--dump"], "d.npz"),
        }

    def run(self, words: list[str], *more: str) -> None:
        subprocess.run([*RUN, *words, *more], check=True, capture_output=True)

    def kill(self, name: str, way: str, rng: random.Random, longest: float) -> str:
        """One kill; what is wrong afterwards, in words, or nothing."""
        words, file = self.commands[name]
        target = self.folder / "out" / file
        old = digest(target)
        call = [*RUN, *words, str(target)]
        process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_main(process.pid)
        time.sleep(rng.random() * longest)
        process.send_signal({"TERM": signal.SIGTERM, "KILL": signal.SIGKILL}.get(way, signal.SIGINT))
        if way == "INT twice":
            time.sleep(rng.random() * 0.02)
            process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        new = digest(target)
        allowed = (0, 130, -signal.SIGKILL) if way == "KILL" else (0, 2, 130)  # 2: apply does not overwrite
        if process.returncode not in allowed:
            return f"{name} {way}: status {process.returncode}: {err[-300:]}"
        if "Traceback" in err:
            return f"{name} {way}: {err[-600:]}"
        left = [p.name for p in (self.folder / "out").iterdir() if p.name.startswith(".")]
        if left and process.returncode != -signal.SIGKILL:
            return f"{name} {way}: left {left}"
        self.settle(name, target)
        left = [p.name for p in (self.folder / "out").iterdir() if p.name.startswith(".")]
        if left:
            return f"{name} {way}: the next run left {left}"
        return "" if new in (old, digest(target)) else f"{name} {way}: {new} is neither the old file nor the new one"

    def settle(self, name: str, target: Path) -> None:
        """The next run, which writes to its end; what cannot be overwritten is taken away first."""
        if target.is_dir():
            shutil.rmtree(target)
        self.run(self.commands[name][0], str(target))


def wait_for_main(pid: int) -> None:
    """Until the program catches SIGTERM: before that it is Python's own start, which ends in Python's own way."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        time.sleep(0.3)
        return
    for _ in range(500):
        caught = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt")]
        if not caught or int(caught[0], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


def killed(count: int, seed: int, folder: Path, longest: float = 1.5) -> list[str]:
    """What was wrong after `count` kills."""
    scene, rng = Scene(folder), random.Random(seed)
    found = []
    for number in range(count):
        name = list(scene.commands)[number % 4]
        found.append(scene.kill(name, WAYS[number // 4 % 4], rng, longest))
    return [f for f in found if f]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    count, seed = (int(w) for w in [*sys.argv[1:], *("200", "0")[len(sys.argv) - 1 :]])
    with tempfile.TemporaryDirectory() as scratch:
        wrong = killed(count, seed, Path(scratch))
    print(f"{count} kills, {len(wrong)} with a fault")
    print("\n".join(wrong))
    sys.exit(bool(wrong))
