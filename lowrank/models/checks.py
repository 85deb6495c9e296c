"""Numbers of a `config.json`."""

from __future__ import annotations

import math
from typing import Any

from lowrank.errors import ConfigError


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_size(name: str, value: Any) -> None:
    if not is_integer(value) or not 0 < value < 2**31:
        raise ConfigError(f"{name}: expected a positive integer; got {value!r}")


def check_positive(name: str, value: Any) -> None:
    if not (is_integer(value) or isinstance(value, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{name}: expected a positive number; got {value!r}")
