"""The numbers of an optimizer, refused where they can only be a mistake."""

from __future__ import annotations

import math
from typing import Any

from lowrank.errors import ConfigError


def check_number(name: str, value: Any) -> None:
    """ConfigError unless `value` can be the number of that name: betas are two, below 1."""
    if name == "betas":
        fits = isinstance(value, tuple | list) and len(value) == 2
        if not fits or not all(_is_number(beta) and 0 <= beta < 1 for beta in value):
            raise ConfigError(f"betas: expected two numbers from 0 to below 1; got {value!r}")
    elif not _is_number(value) or not 0 <= value < math.inf:
        raise ConfigError(f"{name}: expected a finite number of at least 0; got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
