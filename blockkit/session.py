"""A model on a backend, with its tokenizer: texts in, a measured patch out.

session = Session("gemma3-270m", backend="numpy")
result = session.absorb("The dog is called Biscuit.", " The dog's name is")
result.patch.save("patch.safetensors")
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .absorbing.algorithm import Absorbed, absorb
from .absorbing.backends import open_executor, running_backend
from .absorbing.measure import Reference, measure
from .absorbing.request import Request
from .absorbing.written import promised
from .checkpoint.model import open_checkpoint
from .checkpoint.tokenizer import load_tokenizer
from .display import tagged
from .patch.patch import Patch
from .progress import Progress, silent


@dataclass(frozen=True)
class Result:
    """A context absorbed, what it is judged against, and the time by stage in seconds."""

    absorbed: Absorbed
    reference: Reference
    patch: Patch
    seconds: dict[str, float]

    def __repr__(self) -> str:
        without, floor = self.reference.unpatched.linf, self.reference.floor.linf
        return tagged(
            self, f"largest error {self.absorbed.measured.linf:.2g}, no patch {without:.2g}, floor {floor:.2g}"
        )


class Session:
    """Opens a model and absorbs contexts into it.

    Args:
        model: `gemma3-270m`, a `.gguf` file or a Hugging Face folder.
        backend: `numpy`, `jax`, `tensorflow` or `torch`; None for the one that Keras runs on or KERAS_BACKEND names,
            else numpy. For the last three, KERAS_BACKEND must have been set to it before Keras was imported.
        dtype: `float32`, `float64` or `bfloat16`, as far as the backend has it.

    Raises:
        BadInput: the model, the backend or the dtype cannot be used.
        MissingDependency: an optional package is missing; the message holds the install line.
    """

    def __init__(
        self, model: str, backend: str | None = None, dtype: str = "float32", progress: Progress | None = None
    ) -> None:
        report = progress or silent
        start = time.perf_counter()
        self.backend, self.dtype = running_backend() if backend is None else backend, dtype
        self.model = open_checkpoint(model, report)
        self.tokenizer = load_tokenizer(self.model.folder.path)
        report(f"loading the weights ({self.backend}, {dtype})", 0.0)
        self.executor = open_executor(self.model, self.backend, dtype)
        self.seconds = {"load": time.perf_counter() - start}

    def __repr__(self) -> str:
        return tagged(self, f"{self.model.architecture.name} on {self.backend}, {self.dtype}")

    def absorb(
        self,
        context: str,
        query: str,
        tokens: str = "last",
        strategy: str | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Algorithm 1, proved by a run of the edited model and measured against the recompute floor.

        The context is tokenized with the tokenizer's special tokens, the query without.

        Raises:
            BadInput: an empty text, or one longer than the model's window.
            NotPatchable, ConditionViolated, ExactnessLost: see `blockkit.absorbing.algorithm.absorb`.
        """
        ids = self.tokenizer.encode(context, special=True), self.tokenizer.encode(query, special=False)
        return self.absorb_ids(*ids, tokens, strategy, progress)

    def absorb_ids(
        self,
        context: Sequence[int],
        query: Sequence[int],
        tokens: str = "last",
        strategy: str | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """The same for token ids `[n]` and `[q]`.

        Raises:
            BadInput: no ids, or more than the model's window has room for.
            NotPatchable, ConditionViolated, ExactnessLost: see `blockkit.absorbing.algorithm.absorb`.
        """
        report = progress or silent
        request = Request(np.array(context, int), np.array(query, int), tokens)
        absorbed = absorb(self.executor, request, strategy, report)
        start = time.perf_counter()
        report("measuring the unpatched model and the recompute floor", 0.0)
        reference = measure(self.executor, absorbed)
        promise = promised(self.model, absorbed, self.dtype, reference.floor.linf)
        seconds = {**self.seconds, **absorbed.seconds, "measure": time.perf_counter() - start}
        return Result(absorbed, reference, Patch.of(absorbed, self.model, self.dtype, promise), seconds)
