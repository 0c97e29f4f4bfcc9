"""The errors a user can meet, each with the exit status its family has on the command line."""

from __future__ import annotations


class BlockkitError(Exception):
    """Base of every error that blockkit raises on purpose."""

    exit_status = 1


class BadInput(BlockkitError):
    """Something that was given cannot be used: the message says what, where and what is allowed."""

    exit_status = 2


class MissingDependency(BadInput):
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
