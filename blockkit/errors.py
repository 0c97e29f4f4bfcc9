"""The errors a user can meet, each with the exit status its family has on the command line."""

from __future__ import annotations

import traceback
from pathlib import Path


class BlockkitError(Exception):
    """Base of every error that blockkit raises on purpose."""

    exit_status = 1


class BadInput(BlockkitError):
    """Something that was given cannot be used: the message says what, where and what is allowed.

    Attributes:
        at: the node, parameter or component of a block that is to blame, for whoever knows where it is written.
    """

    exit_status = 2

    def __init__(self, message: str, at: str | None = None) -> None:
        super().__init__(message)
        self.at = at


class MissingDependency(BadInput, ImportError):
    """An optional package is not installed: the message holds the install line."""


class NotPatchable(BlockkitError):
    """A well-formed no: no route of the planner answers the request."""


class ConditionViolated(BlockkitError):
    """A value condition of a law does not hold for the values at hand, so nothing was divided.

    Attributes:
        node: the graph node whose value breaks the condition.
        parameter: the parameter that was to be solved for.
        coordinates: the first offending coordinates, at most eight.
        size: the largest change, in absolute value, that was asked of those coordinates.
    """

    def __init__(
        self,
        message: str,
        *,
        node: str,
        parameter: str,
        coordinates: tuple[int, ...] = (),
        size: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.node = node
        self.parameter = parameter
        self.coordinates = coordinates
        self.size = size


class ExactnessLost(BlockkitError):
    """The edited model was run and does not reproduce the contextual one closely enough."""


def blamed(error: BaseException) -> str:
    """A foreign exception in one line, with the file and line of the last call that is not a library's."""
    raised = list(traceback.extract_tb(error.__traceback__))
    frames = [f for f in raised if "site-packages" not in f.filename] or raised
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
