"""What can go wrong in a run."""

from __future__ import annotations


class UsageError(Exception):
    """A mistake in the command; exit status 2."""


class MissingInputError(Exception):
    """A benchmark lacks its model or data; it is left out with this reason."""
