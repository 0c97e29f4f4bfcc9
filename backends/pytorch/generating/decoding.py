"""Running a model token by token, with or without a cache of keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blockkit.absorbing import sampling
from blockkit.errors import BadInput

from ..calling.interface import Interface, logits_of
from ..calling.prompts import Prompt


@dataclass
class Decoder:
    """A sequence that grows, run by the model itself.

    Attributes:
        caching: whether earlier tokens are remembered by the model; if not, all of them run again for every step.
    """

    model: nn.Module
    interface: Interface
    caching: bool = True
    past: Any = None
    before: Prompt | None = field(default=None, repr=False)

    def run(self, prompt: Prompt, keep: int = 1) -> Tensor:
        """The logits `[batch, keep, vocabulary]` of the last `keep` tokens, behind all that ran before."""
        if not self.caching:
            self.before = prompt if self.before is None else _followed(self.before, prompt)
            prompt = self.before
        options = prompt.options(logits_to_keep=keep)
        if self.caching:
            options |= {"use_cache": True, "past_key_values": self.past}
        args, kwargs = self.interface.inputs(prompt.value, **options)
        result = self.model(*args, **kwargs)
        if self.caching:
            self.past = getattr(result, "past_key_values", None)
            if self.past is None:  # some classes take a cache and give none: earlier tokens would be lost silently
                self.caching, self.before = False, prompt
        return logits_of(result)[:, -keep:]

    def begin(self) -> None:
        """An empty cache of the kind the model makes, for runs that are cut short before they give it back."""
        if self.caching and self.past is None:
            self.past = empty_cache(self.model)


def _followed(before: Prompt, prompt: Prompt) -> Prompt:
    return Prompt(torch.cat([before.value, prompt.value], 1), torch.cat([before.positions, prompt.positions], 1))


def empty_cache(model: nn.Module) -> Any:
    """A cache that the model fills as it runs."""
    from transformers import DynamicCache

    config = getattr(model, "config", None)
    try:
        return DynamicCache(config=config)
    except Exception as error:
        raise BadInput(f"no cache can be made for {type(model).__name__}: {error}") from error


def can_cache(model: nn.Module, interface: Interface) -> bool:
    """Whether the model takes and gives a cache of keys and values that is filled in place."""
    asked = "use_cache" in interface.takes or interface.anything
    return asked and "past_key_values" in interface.takes and hasattr(model, "config")


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
