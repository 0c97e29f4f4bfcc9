"""What is to be absorbed, and for which tokens the result is to be exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import BadInput

MODES = ("last", "each", "all")


@dataclass(frozen=True)
class Request:
    """What is to be absorbed, and for which tokens the result is to be exact.

    Attributes:
        context, query: token ids `[n]`; the context is what is removed, the query stays.
        tokens: `last` (one patch, for the query's last token), `each` (a patch a token) or `all`
            (one static patch for all query tokens).
        start: the position of the query's first token when it runs alone; None for the one it has behind the
            context. The patch is exact for a run from there, whatever positions mean to the model.
    """

    context: np.ndarray
    query: np.ndarray
    tokens: str = "last"
    start: int | None = None

    def __post_init__(self) -> None:
        if self.tokens not in MODES:
            raise BadInput(f"tokens={self.tokens!r}; allowed are {', '.join(MODES)}")
        if not len(self.query):
            raise BadInput("the query is empty: it must hold at least one token, for which the patch is made")
        if not len(self.context):
            raise BadInput("the context is empty: there is nothing to absorb")

    @property
    def positions(self) -> np.ndarray:
        """The query's positions in the contextual sequence."""
        return np.arange(len(self.context), len(self.context) + len(self.query))

    @property
    def reduced_positions(self) -> np.ndarray:
        """The query's positions when it runs alone."""
        return self.positions if self.start is None else np.arange(self.start, self.start + len(self.query))

    @property
    def served(self) -> np.ndarray:
        """The rows of the query for which the patch is exact."""
        return np.arange(len(self.query))[-1:] if self.tokens == "last" else np.arange(len(self.query))

    @property
    def capacity(self) -> int | None:
        """How many tokens one static value has to serve; None where each token has its own."""
        return None if self.tokens == "each" else len(self.served)

    @property
    def merge(self) -> bool:
        return self.tokens != "each"
