"""Running a model token by token, with or without a cache of keys and values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blockkit.absorbing import sampling
from blockkit.absorbing.lockstep import EPS
from blockkit.errors import BadInput

from ..absorbing.run import model_dtype
from ..calling.interface import Interface, logits_of
from ..calling.prompts import Prompt
from ..calling.token_rows import close


@dataclass
class Decoder:
    """A sequence that grows, run by the model itself.

    Attributes:
        cache: the keyword by which the model takes its cache and gives it back; None for one that remembers nothing:
            then all earlier tokens run again for every step.
    """

    model: nn.Module
    interface: Interface
    cache: str | None
    past: Any = None
    before: Prompt | None = field(default=None, repr=False)

    def run(self, prompt: Prompt, keep: int = 1) -> Tensor:
        """The logits `[batch, keep, vocabulary]` of the last `keep` tokens, behind all that ran before.

        Raises:
            BadInput: the model took its cache before, and gives none now.
        """
        if self.cache is None:
            self.before = prompt if self.before is None else _followed(self.before, prompt)
            prompt = self.before
        args, kwargs = self.interface.inputs(prompt.value, **prompt.options(logits_to_keep=keep))
        if self.cache is not None:
            kwargs |= {"use_cache": True, self.cache: self.past}
        result = self.model(*args, **kwargs)
        if self.cache is not None:
            self.past = getattr(result, self.cache, None)
            if self.past is None:  # earlier tokens would be lost silently
                raise BadInput(f"{type(self.model).__name__} was given {self.cache} and gives none back")
        return logits_of(result)[:, -keep:]

    def begin(self) -> None:
        """An empty cache of the kind the model makes, for runs that are cut short before they give it back."""
        if self.cache is not None and self.past is None:
            self.past = empty_cache(self.model)


def _followed(before: Prompt, prompt: Prompt) -> Prompt:
    positions = torch.cat([before.positions, prompt.positions], -1)
    return Prompt(torch.cat([before.value, prompt.value], 1), positions)


def empty_cache(model: nn.Module) -> Any:
    """A cache that the model fills as it runs."""
    from transformers import DynamicCache

    return DynamicCache(config=getattr(model, "config", None))


def cache_keyword(model: nn.Module, interface: Interface, prompt: Prompt) -> str | None:
    """The keyword of `forward` by which the model takes a cache that it fills in place; None if there is none.

    It is found in what the model gives back, by what it can do (`get_seq_length`), and proved: the prompt's tokens
    behind its first one have to give the logits that they give in one run.

    Args:
        prompt: its first four tokens run; of fewer than two nothing can be told.
    """
    prompt = prompt.part(0, 4)
    first, rest = prompt.part(0, 1), prompt.part(1)
    with torch.no_grad():
        try:
            name = _given_back(model, interface, first)
            if name is None:
                return None
            wanted = Decoder(model, interface, None).run(prompt, rest.length)
            decoder = Decoder(model, interface, name)
            decoder.begin()
            filled = decoder.past
            decoder.run(first)
            found = decoder.run(rest, rest.length)
        except Exception:  # one that cannot be used is none
            return None
    fits = filled is decoder.past and close(found.float(), wanted.float(), max(1e-4, 32 * EPS[model_dtype(model)]))
    return name if fits else None


def _given_back(model: nn.Module, interface: Interface, prompt: Prompt) -> str | None:
    """The name of the cache in the result of a run that is asked for one."""
    args, kwargs = interface.inputs(prompt.value, **prompt.options())
    result = model(*args, **{**kwargs, "use_cache": True})
    items = result.items() if isinstance(result, Mapping) else ()
    return next((name for name, value in items if hasattr(value, "get_seq_length")), None)


def warn_uncached(model: nn.Module) -> None:
    """Says that every step will be a run of the whole prompt."""
    warnings.warn(
        f"{type(model).__name__} takes no cache that it fills in place and gives back, so the whole prompt runs again "
        "for every token",
        stacklevel=5,
    )


@dataclass(frozen=True)
class Sampling(sampling.Sampling):
    """Draws of the next token; see `blockkit.absorbing.sampling.Sampling` for its numbers and their limits."""

    def generator(self) -> torch.Generator:
        """A source of chance that starts at the seed."""
        return torch.Generator().manual_seed(self.seed)

    def noise(self, vocabulary: int, generator: torch.Generator) -> Tensor | None:
        """The next token's chance `[vocabulary]`, which one or more models' logits may share; None without chance."""
        if self.temperature == 0:
            return None
        return -torch.empty(vocabulary, dtype=torch.float64).exponential_(generator=generator).log()

    def choose(self, logits: Tensor, noise: Tensor | None) -> int:
        """The next token for logits `[vocabulary]`: with Gumbel noise, the largest sum is a draw from their softmax.

        So equal noise gives equal tokens for logits that differ by rounding, but for a near tie of two sums.
        """
        logits = logits.double().cpu()
        if noise is None:
            return int(logits.argmax())
        logits = logits / self.temperature
        kept = torch.ones_like(logits, dtype=torch.bool)
        if self.top_k is not None and self.top_k < len(logits):
            kept &= logits >= logits.topk(self.top_k).values[-1]
        if self.top_p is not None:
            ordered, places = torch.softmax(logits.masked_fill(~kept, -torch.inf), -1).sort(descending=True)
            kept[places[ordered.cumsum(0) - ordered >= self.top_p]] = False
        return int((logits + noise).masked_fill(~kept, -torch.inf).argmax())
