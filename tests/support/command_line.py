"""The command line, in the process of the tests or in one of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from blockkit.cli.main import main

RUN = [sys.executable, "-c", "from blockkit.cli.main import main; main()"]


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one message, after the lines of progress."""
        assert self.out == "" and "Traceback" not in self.err
        assert self.err.count("error: ") == 1 and self.err.endswith("\n")
        return self.err.split("error: ")[1]

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1  # one object and nothing else
        return json.loads(self.out)


class CommandLine:
    """`main()` in this process, as the console script calls it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words: str | Path) -> Done:
        self.monkeypatch.setattr(sys, "argv", ["blockkit", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self.capsys.readouterr()
        return Done(int(ended.value.code or 0), out, err)

    def absorb(self, model: str | Path, *words: str | Path) -> Done:
        return self("absorb", "--model", model, "--backend", "numpy", *words)

    def refused(self, *words: str | Path) -> str:
        done = self(*words)
        assert done.status == 2, done
        return done.message
