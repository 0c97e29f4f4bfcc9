"""The generation experiment of arXiv 2511.17864: the contextual model and a patched one, token by token.

The prompt is the context, its last token the first query; after every token the next one is the contextual model's.
`each` makes a patch of its own for every token, which then runs with nothing before it. `all` keeps one static patch
that grows: the patched model sees the tokens generated so far, through its edited weights and its own cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from blockkit.absorbing.metrics import Comparison, compare
from blockkit.absorbing.proof import require_exact
from blockkit.errors import BadInput, ExactnessLost

from ..absorbing.absorb import absorbed_patch, originals
from ..absorbing.lockstep import Solver, Task, plans
from ..absorbing.run import call, model_dtype
from ..blocks.traced import Traced, trace
from ..calling.arguments import require_whole, stops
from ..calling.interface import Interface
from ..calling.prompts import Prompt, joined, require_ready
from ..editing.patch import TorchPatch
from ..editing.proving import worn
from ..watching.observe import Chosen
from ..watching.watcher import Finished, Rows, Seen, Watcher
from .decoding import Decoder, Sampling, cache_keyword, warn_uncached
from .growing import Grower, Grown

MODES = ("each", "all")
S = TypeVar("S", bound=Solver)


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
        id: the next token, chosen from the contextual logits.
        patched_id: the patched model's next token, chosen in the same way (by chance: with the same chance); None
            where its logits were not asked for.
        measured: how far the patched logits are from the contextual ones; None likewise.
        seconds: of the contextual step, of the patched one, and of the proof.
    """

    id: int
    patched_id: int | None
    measured: Comparison | None
    seconds: tuple[float, float, float]


@dataclass
class Generation:
    """A generation under way: iterate to get its tokens one by one.

    Attributes:
        tokens: those so far.
        patch: the last token's patch (`each`), or the one static patch for all tokens (`all`), when it is finished.
        measured: with `all`, one ordinary run of the finished static weights on all query and generated tokens.
        static_ids: with `all`, the most probable next token after each of those in that run.
        amplification: with `all`, by how much rounding was amplified most where a token's input was nearly spanned
            by those before it.
    """

    steps: Iterator[Token]
    tokens: list[Token] = field(default_factory=list)
    patch: TorchPatch | None = None
    measured: Comparison | None = None
    static_ids: tuple[int, ...] = ()
    amplification: float = 1.0

    def __iter__(self) -> Iterator[Token]:
        for token in self.steps:
            self.tokens.append(token)
            yield token

    def finish(self) -> Generation:
        """Generates all that is left."""
        for _ in self:
            pass
        return self

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def generate(
    model: nn.Module,
    prompt: Tensor,
    *,
    query: int = 1,
    max_new_tokens: int = 20,
    tokens: str = "each",
    strategy: str | None = None,
    merge: bool = False,
    compare_logits: bool = True,
    sampling: Sampling | None = None,
    stop_at: Iterable[int] = (),
) -> Generation:
    """Generates from the contextual model, and patches the model for every token on the way.

    Args:
        prompt: ids `[1, n]`, of which the last `query` are not context.
        tokens: `each` (a patch of its own for every token) or `all` (one static patch that grows).
        merge: with `each`, changes are rounded into the weights; with `all`, at the end, once.
        compare_logits: whether the patched model's own logits are worked out at every step.
        sampling: how the next token is chosen; by default the most probable one.
        stop_at: ids after which nothing follows.

    Raises:
        BadInput, NotPatchable, ConditionViolated, ExactnessLost: as `absorb`, while iterating or before.
    """
    interface = require_ready(model)
    if tokens not in MODES:
        raise BadInput(f"tokens={tokens!r}; allowed are {', '.join(MODES)}")
    require_whole("max_new_tokens", max_new_tokens, 1)
    require_whole("query", query, 1)
    stop_at = stops(stop_at)
    if not isinstance(sampling, Sampling | None):
        raise BadInput(
            f"sampling must be a Sampling(temperature=..., top_k=..., top_p=..., seed=...), got {sampling!r:.60}"
        )
    if not isinstance(prompt, Tensor) or prompt.dim() != 2 or prompt.shape[0] != 1 or query >= prompt.shape[1]:
        raise BadInput(f"the prompt must be ids [1, n] with n > {query}: a context, and {query} token(s) of query")
    if "decoder_input_ids" in interface.takes:
        raise BadInput(
            f"{type(model).__name__} is an encoder-decoder model; absorb(..., decoder_input_ids=...) serves it"
        )
    _require_room(model, int(prompt.shape[1]) + max_new_tokens - 1)
    n = int(prompt.shape[1]) - query
    traced = trace(model)
    whole = joined(model, prompt[:, :n], prompt[:, n:], (None, None), traced.first)
    generation = Generation(iter(()))
    run = _Run(
        model, interface, traced, whole, n, max_new_tokens, strategy, merge, compare_logits,
        sampling or Sampling(), stop_at, generation,
    )  # fmt: skip
    generation.steps = run.each() if tokens == "each" else run.growing()
    return generation


def _require_room(model: nn.Module, length: int) -> None:
    """Refuses more tokens than the model has places for, before it fails on the way."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    places = getattr(text, "max_position_embeddings", None)
    if isinstance(places, int) and 0 < places < length:
        raise BadInput(f"prompt and new tokens are {length} tokens; the model has places for {places}: ask for fewer")


@dataclass
class _Run:
    model: nn.Module
    interface: Interface
    traced: Traced
    whole: Prompt
    context: int
    count: int
    strategy: str | None
    merge: bool
    compare_logits: bool
    sampling: Sampling
    stop_at: frozenset[int]
    generation: Generation

    def __post_init__(self) -> None:
        self.stored, self.dtype = originals(self.model), model_dtype(self.model)
        self.cache = cache_keyword(self.model, self.interface, self.whole)
        if self.cache is None:
            warn_uncached(self.model)
        self.random = self.sampling.generator()

    # -- a patch for every token ---------------------------------------------------------------------

    def each(self) -> Iterator[Token]:
        """A patch for every token alone; the proof is a run of the edited model on that token."""
        task = Task(self.strategy, False, self.merge)
        self.traced, chosen = plans(self.traced, task, 1)
        rows = Rows(1, 1)
        decoder = Decoder(self.model, self.interface, self.cache)
        following, last = self.whole, self.whole.part(-1)
        for _ in range(self.count):
            clock = time.perf_counter()
            logits, target = self._contextual(decoder, chosen, rows, following)
            contextual = time.perf_counter()
            solver = self._solver(Solver, chosen, rows, task, target, 1)
            with torch.no_grad(), suppress(Finished), solver.watching():
                call(self.model, self.interface, last, 1, {})
            solver.require_all()
            solved = time.perf_counter()
            patch = self._patch(task, solver, "last", last)
            own = self._proved(patch, last, 1) if self.compare_logits else None
            done = time.perf_counter()
            self.generation.patch = patch
            seconds = contextual - clock, solved - contextual, done - solved
            token = self._token(logits, own, seconds)
            yield token
            if token.id in self.stop_at:
                return
            following = last = self._next(token.id, last)

    def _proved(self, patch: TorchPatch, prompt: Prompt, keep: int) -> Tensor:
        with torch.no_grad(), worn(patch, self.model):
            return call(self.model, self.interface, prompt, keep, {})

    # -- one static patch that grows -----------------------------------------------------------------

    def growing(self) -> Iterator[Token]:
        """One patch for all tokens; each step is a run of the edited model on the new token behind its own cache."""
        task = Task(self.strategy or "joint", False, False, twice=False)
        query = self.whole.part(self.context)
        self.traced, chosen = plans(self.traced, task, query.length + self.count)
        contextual, reduced = (Decoder(self.model, self.interface, self.cache) for _ in range(2))
        grown: dict[str, Grown] = {}
        following, here, seen = self.whole, query, query
        kept: list[np.ndarray] = []
        targets: list[dict[int, Seen]] = []
        for number in range(self.count):
            clock = time.perf_counter()
            rows = Rows(1, here.length)
            logits, target = self._contextual(contextual, chosen, rows, following)
            middle = time.perf_counter()
            targets.append(target)
            stop = not self.compare_logits and self.cache is not None
            if stop:
                reduced.begin()
            grower = self._solver(Grower, chosen, rows, task, target, here.length)
            grower.grown, grower.stop = grown, stop
            own = None
            with torch.no_grad(), suppress(Finished), grower.watching():
                own = reduced.run(here, here.length)
            done = time.perf_counter()
            if self.compare_logits:
                kept.append(logit_rows(logits))
            token = self._token(logits[:, -1:], own[:, -1:] if self.compare_logits and own is not None else None,
                                (middle - clock, done - middle, 0.0))  # fmt: skip
            if number == self.count - 1 or token.id in self.stop_at:
                self._finished(task, grower, seen, kept, targets)
            yield token
            if token.id in self.stop_at:
                return
            following = here = self._next(token.id, here)
            seen = Prompt(torch.cat([seen.value, here.value], 1), torch.cat([seen.positions, here.positions], -1))

    def _finished(
        self, task: Task, grower: Grower, seen: Prompt, kept: list[np.ndarray], targets: list[dict[int, Seen]]
    ) -> None:
        """The static patch, proved by one ordinary run of its weights on all tokens.

        The changes grew in runs of one token; they are solved once more for all tokens together, in the arithmetic of
        a run of all of them, in which the same sums round otherwise.
        """
        task, rows = replace(task, merge=self.merge), Rows(1, seen.length)
        target = {place: _together([t[place] for t in targets]) for place in targets[0]}
        solver = self._solver(Solver, plans(self.traced, task, seen.length)[1], rows, task, target, seen.length)
        with torch.no_grad(), suppress(Finished), solver.watching():
            call(self.model, self.interface, seen, seen.length, {})
        solver.require_all()
        patch = self._patch(task, solver, "all", seen)
        wanted = np.concatenate(kept) if kept else logit_rows(self._again(seen))
        own = logit_rows(self._proved(patch, seen, seen.length))
        self.generation.measured = measured = compare(own, wanted)
        self.generation.static_ids = tuple(int(i) for i in own.argmax(-1))
        try:
            require_exact(measured, wanted, self.dtype)
        except ExactnessLost as error:
            raise ExactnessLost(
                f"one run of the finished static weights: {error}, or tokens='each' (too many tokens may read the same)"
            ) from None
        self.generation.patch = replace(patch, measured=asdict(measured))
        self.generation.amplification = max((g.amplification for g in grower.grown.values()), default=1.0)

    def _again(self, seen: Prompt) -> Tensor:
        """The contextual logits of all tokens, in one run."""
        before = self.whole.part(0, self.context)
        whole = Prompt(torch.cat([before.value, seen.value], 1), torch.cat([before.positions, seen.positions], 1))
        with torch.no_grad():
            return call(self.model, self.interface, whole, seen.length, {})

    # -- both ----------------------------------------------------------------------------------------

    def _contextual(
        self, decoder: Decoder, chosen: Mapping[int, Chosen | None], rows: Rows, prompt: Prompt
    ) -> tuple[Tensor, dict[int, Seen]]:
        watcher = Watcher(self.model, self.traced, rows, chosen)
        with torch.no_grad(), watcher.watching():
            logits = decoder.run(prompt, rows.tokens)
        return logits, watcher.seen

    def _solver(
        self, kind: type[S], chosen: Mapping[int, Chosen | None], rows: Rows, task: Task, target: dict[int, Seen],
        capacity: int,
    ) -> S:  # fmt: skip
        return kind(
            self.model, self.traced, rows, chosen, task=task, target=target, capacity=capacity, dtype=self.dtype,
            stored=self.stored,
        )  # fmt: skip

    def _patch(self, task: Task, solver: Solver, tokens: str, prompt: Prompt) -> TorchPatch:
        length = int(prompt.positions[0, 0]) - self.traced.first
        return absorbed_patch(self.model, self.interface, task, solver, tokens, length, prompt)

    def _token(self, logits: Tensor, own: Tensor | None, seconds: tuple[float, float, float]) -> Token:
        measured = compare(logit_rows(own), logit_rows(logits)) if own is not None else None
        if measured is not None:
            require_exact(measured, logit_rows(logits), self.dtype)
        patch = self.generation.patch
        if patch is not None and measured is not None and not patch.measured:
            self.generation.patch = replace(patch, measured=asdict(measured))
        noise = self.sampling.noise(logits.shape[-1], self.random)
        chosen = self.sampling.choose(logits[0, -1], noise)
        return Token(chosen, self.sampling.choose(own[0, -1], noise) if own is not None else None, measured, seconds)

    def _next(self, chosen: int, before: Prompt) -> Prompt:
        value = torch.tensor([[chosen]], device=before.value.device)
        return Prompt(value, before.positions[:, -1:] + 1)


def _together(parts: list[Seen]) -> Seen:
    """What several runs, one after the other, showed of a block."""
    return Seen({name: torch.cat([part.shown[name] for part in parts]) for name in parts[0].shown})


def logit_rows(logits: Tensor) -> np.ndarray:
    """Logits `[1, tokens, vocabulary]` as rows on the host, float32 or wider."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return np.asarray(wide.reshape(-1, logits.shape[-1]).cpu().numpy())
