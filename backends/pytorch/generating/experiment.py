"""The generation experiment on a Hugging Face checkpoint, and what its errors are judged against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockkit.absorbing.generation import Settings, Static, Step, Yardstick
from blockkit.absorbing.metrics import compare

from ..absorbing.run import call
from ..blocks.traced import trace
from ..calling.interface import Interface
from ..calling.loading import load_model
from ..calling.prompts import joined
from ..editing.patch import TorchPatch
from .decoding import Decoder, Sampling, cache_keyword
from .generate import Generation, generate, logit_rows


def opened(folder: Path, ids: list[int], settings: Settings) -> TransformersExperiment:
    """The checkpoint as `transformers` loads it, and the experiment on it.

    Raises:
        BadInput: the folder cannot be loaded, or the prompt does not fit the model.
        MissingDependency: `transformers` is not installed.
    """
    return TransformersExperiment(load_model(folder, settings.dtype), ids, settings)


class TransformersExperiment:
    """See `blockkit.absorbing.generation.Experiment`; `model` is any causal language model in memory.

    Args:
        ids: the prompt's, of which the last `query` are no context.
    """

    def __init__(
        self, model: nn.Module, ids: list[int], settings: Settings, query: int = 1, stops: bool = True
    ) -> None:
        s = self.settings = settings
        self.model, self.query, self.alone = model, query, s.tokens == "each"
        self.prompt = torch.tensor([ids], device=next(model.parameters()).device)
        self.largest_logit, self.chosen = 0.0, np.zeros(0, int)
        self.generation: Generation = generate(
            model, self.prompt, query=query, max_new_tokens=s.max_new_tokens, tokens=s.tokens, strategy=s.strategy,
            merge=s.merge, sampling=Sampling(*astuple(s.sampling)),
            stop_at=ends(model) if stops else frozenset(),
        )  # fmt: skip

    def steps(self) -> Iterator[Step]:
        """See `Experiment`."""
        for token in self.generation:
            measured, patched = token.measured, token.patched_id
            if measured is None or patched is None:
                raise RuntimeError("the patched logits were not worked out")
            yield Step(token.id, patched, measured.linf, measured.tvd, token.seconds)

    def yardsticks(self) -> list[Yardstick]:
        """See `Experiment`; with a longer query, for each of its tokens and each generated one."""
        wanted, others, without = reference_runs(self.model, self.prompt, self.query, self.generation.ids, self.alone)
        self.largest_logit, self.chosen = float(np.abs(wanted).max()), wanted.argmax(-1)
        found = []
        for row in range(len(wanted)):
            here = wanted[row : row + 1]
            floors = [compare(other[row : row + 1], here) for other in others]
            top = np.partition(here[0], -2)[-2:]
            found.append(
                Yardstick(
                    max(floors, key=lambda c: c.linf),
                    all(c.top1_agree == 1 for c in floors),
                    compare(without[row : row + 1], here),
                    float(top[1]) - float(top[0]),
                )
            )
        return found

    def patch(self) -> TorchPatch:
        """See `Experiment`."""
        if self.generation.patch is None:
            raise RuntimeError("nothing was generated")
        return self.generation.patch

    def static(self) -> Static | None:
        """See `Experiment`; after `yardsticks`."""
        run = self.generation
        if run.measured is None:
            return None
        agree = tuple(bool(a == b) for a, b in zip(run.static_ids, self.chosen, strict=True))
        return Static(run.measured, agree, run.amplification)


def ends(model: nn.Module) -> frozenset[int]:
    """The ids after which the model itself would stop."""
    config: Any = getattr(model, "generation_config", None) or getattr(model, "config", None)
    found = getattr(config, "eos_token_id", None)
    return frozenset() if found is None else frozenset([found] if isinstance(found, int) else found)


def reference_runs(
    model: nn.Module, prompt: Tensor, query: int, ids: list[int], alone: bool
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Ordinary runs of the model; logits `[query - 1 + len(ids), vocabulary]` after each query and generated token.

    Args:
        prompt: `[1, n]`.
        ids: the generated ones.
        alone: whether the run without context is one for each token, or one for all of them.

    Returns:
        The contextual run as the experiment makes it (the prompt, then token by token behind its cache); other
        contextual runs that are equal on paper: one run of everything without a cache, and one in which the query,
        too, runs behind a cache of the context; the run without context and patch.
    """
    interface, first = Interface.of(model), int(prompt.shape[1]) - query
    tail = torch.tensor([ids[:-1]], dtype=prompt.dtype, device=prompt.device)
    whole = joined(model, prompt[:, :-1], torch.cat([prompt[:, -1:], tail], 1), (None, None), trace(model).first)
    n, rows, cache = int(prompt.shape[1]), whole.length - first, cache_keyword(model, interface, whole)
    singles = [whole.part(i, i + 1) for i in range(n, whole.length)]
    with torch.no_grad():
        decoder = Decoder(model, interface, cache)
        wanted = [
            logit_rows(decoder.run(whole.part(0, n), query)),
            *(logit_rows(decoder.run(one, 1)) for one in singles),
        ]
        others = [logit_rows(call(model, interface, whole, rows, {}))]
        if cache is not None:
            behind = Decoder(model, interface, cache)
            behind.run(whole.part(0, first), 1)
            pieces = [
                logit_rows(behind.run(whole.part(first, n), query)),
                *(logit_rows(behind.run(one, 1)) for one in singles),
            ]
            others.append(np.concatenate(pieces))
        stay = whole.part(first)
        parts = [stay.part(i, i + 1) for i in range(rows)] if alone else [stay]
        without = [logit_rows(call(model, interface, part, part.length, {})) for part in parts]
    return np.concatenate(wanted), others, np.concatenate(without)
