"""What a model says next: greedy decoding on an executor, by plain runs of everything so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..progress import Progress, silent
from .executor import Executor, Overlays
from .run import logits_of, run_stream


def greedy(
    executor: Executor,
    ids: Sequence[int],
    count: int,
    start: int = 0,
    overlays: Overlays | None = None,
    progress: Progress | None = None,
) -> list[int]:
    """The `count` most probable next tokens, each behind those before it.

    Every run has one length: a causal model sees nothing of what stands to the right, and a backend compiles once.

    Args:
        ids: what stands before, at the positions from `start` on.
        overlays: changed parameters by layer, merged into the weights.
        progress: called with a stage and the fraction of it that is done.
    """
    report, known, length = progress or silent, list(map(int, ids)), len(ids) + count - 1
    for number in range(count):
        report("decoding", number / count)
        row = np.array([*known, *[0] * (length - len(known))])
        stream = run_stream(executor, row, np.arange(start, start + length), overlays)
        at = len(known) - 1
        known.append(int(logits_of(executor, stream[at : at + 1])[0].argmax()))
    return known[len(ids) :]


def agreed(draft: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """The greedy continuation as far as one run over `draft` tells it: up to the first other choice, and with it.

    Args:
        chosen: the most probable token at each place of the draft, behind the draft's tokens before it.
    """
    same = next((i for i, (a, b) in enumerate(zip(draft, chosen, strict=True)) if a != b), len(draft) - 1)
    return list(map(int, chosen[: same + 1]))
