"""What can go wrong in a run."""

from __future__ import annotations


class UsageError(Exception):
    """A mistake in the command; exit status 2."""


class MissingInputError(Exception):
    """A benchmark lacks its model or data; it is left out with this reason."""


class ContenderError(Exception):
    """One side of a comparison failed in its first calls."""

    def __init__(self, name: str, error: Exception) -> None:
        said = str(error).strip().split("\n")[0]
        super().__init__(f"{name} failed: {type(error).__name__}: {said}")
        self.name = name
