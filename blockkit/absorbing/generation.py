"""The generation experiment of arXiv 2511.17864 on a real model, for people: a prompt in, tokens and measurements out.

A backend carries it out: a callable that a package registers as an entry point of the group `blockkit.generators`,
under the name of the library that opens the model (`transformers`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from ..checkpoint.cache import resolve_model
from ..checkpoint.tokenizer import load_tokenizer
from ..display import tagged
from ..errors import BadInput, MissingDependency
from ..extras import reason
from ..progress import Progress
from .metrics import Comparison
from .sampling import Sampling

GROUP = "blockkit.generators"
MODES = ("each", "all")


@dataclass(frozen=True)
class Settings:
    """What is asked of the experiment.

    Attributes:
        tokens: `each` (a patch of its own for every token) or `all` (one static patch that grows).
        merge: changes are rounded into the weights; with `all`, at the end, once.
        sampling: how the next token is chosen.
    """

    max_new_tokens: int = 20
    dtype: str = "float32"
    tokens: str = "each"
    strategy: str | None = None
    merge: bool = False
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise BadInput(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


@dataclass(frozen=True)
class Step:
    """One token: the contextual model's choice and the patched model's, and how far their logits are apart.

    Attributes:
        seconds: of the contextual step, of the patched one, and of the proof.
    """

    id: int
    patched_id: int
    linf: float
    tvd: float
    seconds: tuple[float, float, float]


@dataclass(frozen=True)
class Yardstick:
    """What one token's error is judged against, all against the contextual run of the experiment.

    Attributes:
        floor: the farthest of the contextual runs that are equal on paper (with and without a cache).
        stable: whether all of those choose the same most probable token.
        unpatched: the model without context and without patch.
        margin: by how much the contextual logit of the most probable token exceeds the next one.
    """

    floor: Comparison
    stable: bool
    unpatched: Comparison
    margin: float


@dataclass(frozen=True)
class Static:
    """One ordinary run of the finished static weights, on all tokens.

    Attributes:
        agree: for each token, whether its most probable one is the contextual run's.
        amplification: by how much rounding was amplified most where a token's input was nearly spanned by those
            before it.
    """

    measured: Comparison
    agree: tuple[bool, ...]
    amplification: float


class Saved(Protocol):
    """What can be written to a file."""

    def save(self, path: str | Path) -> None:
        """Writes it; an existing file is replaced only when the new one is complete."""
        ...


class Experiment(Protocol):
    """A model that is open, and the experiment on it.

    Attributes:
        settings: as they were carried out (a model in memory has a dtype of its own).
        largest_logit: of the contextual run, in absolute value, once `yardsticks` has run.
    """

    settings: Settings
    largest_logit: float

    def steps(self) -> Iterator[Step]:
        """The tokens, each as soon as it is known."""
        ...

    def yardsticks(self) -> list[Yardstick]:
        """What the tokens so far are judged against; further runs of the model."""
        ...

    def static(self) -> Static | None:
        """With `all`, the run of the finished weights."""
        ...

    def patch(self) -> Saved:
        """The patch of the last token (`each`), or the one for all of them (`all`), when all are generated."""
        ...


Opener = Callable[[Path, list[int], Settings], Experiment]


@dataclass(frozen=True)
class Generated:
    """A finished experiment.

    Attributes:
        prompt: the prompt's ids.
        texts: of the tokens.
        yardsticks: beside the tokens.
        seconds: by stage.
    """

    settings: Settings
    prompt: tuple[int, ...]
    steps: tuple[Step, ...]
    texts: tuple[str, ...]
    text: str
    yardsticks: tuple[Yardstick, ...]
    static: Static | None
    largest_logit: float
    seconds: dict[str, float]

    def __repr__(self) -> str:
        agree = sum(s.id == s.patched_id for s in self.steps)
        return tagged(self, f"{len(self.steps)} tokens, {agree} the same from the patched model: {self.text!r}")

    @property
    def faithful(self) -> bool:
        """Whether the patched model chose every token of which the contextual model itself is sure.

        Not counted are tokens on which contextual runs that are equal on paper disagree. With `all`, the finished
        static weights have to give them too.
        """
        static = (True,) * len(self.steps) if self.static is None else self.static.agree
        agree = (s.id == s.patched_id and fixed for s, fixed in zip(self.steps, static, strict=True))
        return all(ok or not yard.stable for ok, yard in zip(agree, self.yardsticks, strict=True))


class Run:
    """The experiment on an open model; iterate to get each token and its text as soon as it is known.

    Args:
        opener: opens the experiment for the prompt's ids and the settings.
        ids: the prompt's.
        decode: the text of ids.
        started: when opening began, by `time.perf_counter`.

    Raises:
        BadInput: the model, the prompt or a setting cannot be used.
        NotPatchable, ConditionViolated, ExactnessLost: while iterating: the patched model cannot follow.
    """

    def __init__(
        self,
        opener: Callable[[list[int], Settings], Experiment],
        ids: list[int],
        settings: Settings,
        decode: Callable[[list[int]], str],
        started: float | None = None,
    ) -> None:
        clock = time.perf_counter() if started is None else started
        self.ids, self.decode = ids, decode
        if len(ids) < 2:
            raise BadInput(
                f"the prompt is {len(ids)} token(s) long; it takes two: the last stays, those before are context"
            )
        self.experiment = opener(ids, settings)
        self.settings = self.experiment.settings
        self.steps: list[Step] = []
        self.texts: list[str] = []
        self.seconds = {"load": time.perf_counter() - clock}

    @staticmethod
    def open(model: str, prompt: str, settings: Settings, progress: Progress) -> Run:
        """The experiment on a model by name or path.

        Args:
            progress: called with a stage and the fraction of it that is done.

        Raises:
            BadInput: the model, the prompt or a setting cannot be used.
            MissingDependency: an optional package is missing; the message holds the install line.
        """
        clock = time.perf_counter()
        folder = resolve_model(model, progress)
        tokenizer = load_tokenizer(folder)

        def opened(ids: list[int], settings: Settings) -> Experiment:
            progress(f"loading the weights ({settings.dtype})", 0.0)
            return _opener()(folder, ids, settings)

        return Run(opened, tokenizer.encode(prompt, special=True), settings, tokenizer.decode, clock)

    def __iter__(self) -> Iterator[tuple[Step, str]]:
        for step in self.experiment.steps():
            self.texts.append(_text(self.decode, [s.id for s in self.steps], step.id))
            self.steps.append(step)
            yield step, self.texts[-1]

    def finish(self, progress: Progress) -> Generated:
        """All that was generated, beside what it is judged against."""
        clock = time.perf_counter()
        progress("measuring the unpatched model and the recompute floor", 0.0)
        yardsticks, static = self.experiment.yardsticks(), self.experiment.static()
        stages = {
            name: sum(s.seconds[i] for s in self.steps) for i, name in enumerate(("contextual", "patched", "proof"))
        }
        seconds = {**self.seconds, **stages, "measure": time.perf_counter() - clock}
        text = self.decode([s.id for s in self.steps])
        return Generated(
            self.settings, tuple(self.ids), tuple(self.steps), tuple(self.texts), text, tuple(yardsticks), static,
            self.experiment.largest_logit, seconds,
        )  # fmt: skip


def _text(decode: Callable[[list[int]], str], before: list[int], new: int) -> str:
    """What a token adds to the text; part of a character stays with the token that completes it."""
    known, whole = decode(before), decode([*before, new])
    return whole[len(known) :] if whole.startswith(known) else decode([new])


def _opener() -> Opener:
    found = [entry for entry in entry_points(group=GROUP) if entry.name == "transformers"]
    try:
        return found[0].load()
    except (IndexError, ImportError) as error:
        why = reason(error) if found else f"nothing is registered as {GROUP}"
        raise MissingDependency(
            f'generating needs PyTorch and transformers ({why}). Install: pip install "blockkit-patch[inplace]"'
        ) from None
