"""How fast each rotary pair turns, by the kinds of scaling that stretch a context."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import ConfigError

# The numbers each kind needs. yarn and longrope also take `attention_factor`, yarn `beta_fast`,
# `beta_slow`, `mscale`, `mscale_all_dim` and `truncate`.
NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
}
_MOST = 1e12  # of any number: far beyond what is used, and powers of it are still numbers
LENGTH_MATTERS = ("dynamic", "longrope")


def frequencies(
    D: int,
    theta: float,
    scaling: Mapping[str, Any] | None,
    context: int,
    length: int,
    device: torch.device | str,
) -> tuple[Tensor, float]:
    """The angle per position of each rotary pair, float32 [D / 2], and what cos and sin are times.

    f[i] = theta^(-2i / D), and of the kinds of `scaling`

    - "linear" divides all by `factor`;
    - "dynamic" raises theta where `length` positions are more than `context`;
    - "llama3" divides by `factor` those that turn slowly over the original context, and blends;
    - "yarn" does so by its own borders, and makes what is turned longer;
    - "longrope" divides each by a number of its own, another where `length` is beyond the original.

    RoFormer, arXiv:2104.09864, eq. 15; Llama 3, arXiv:2407.21783, §3.4; YaRN, arXiv:2309.00071,
    §3; LongRoPE, arXiv:2402.13753.
    """
    exponent = torch.arange(0, D, 2, dtype=torch.int64, device=device).float() / D
    kind = None if scaling is None else scaling["rope_type"]
    if scaling is None:
        return 1.0 / (theta**exponent), 1.0
    if kind == "dynamic":
        growth = scaling["factor"] * max(length, context) / context - (scaling["factor"] - 1)
        return 1.0 / ((theta * growth ** (D / (D - 2))) ** exponent), 1.0
    original = scaling.get("original_max_position_embeddings", context)
    if kind == "longrope":
        divisors = scaling["long_factor" if length > original else "short_factor"]
        divisor = torch.tensor(divisors, dtype=torch.float32, device=device)
        return 1.0 / (divisor * theta**exponent), _longrope_length(scaling, original, context)
    frequency, factor = 1.0 / (theta**exponent), scaling["factor"]
    if kind == "linear":
        return frequency / factor, 1.0
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        # how many turns the pair makes over the original context: < low slow, > high fast
        turns = original * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * frequency / factor + keep * frequency, 1.0
    keep = 1 - _yarn_ramp(D, theta, scaling, original, device)
    return (1 - keep) * frequency / factor + keep * frequency, _yarn_length(scaling)


def check_scaling(scaling: Mapping[str, Any], D: int, theta: float) -> None:
    """Raises ConfigError for a kind that is not known, and for numbers it needs and has not."""
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in NEEDS:
        raise ConfigError(f"rope_type: expected one of default, {', '.join(NEEDS)}; got {kind!r}")
    given = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "factor")
    also = [name for name in given if scaling.get(name) is not None]
    for name in dict.fromkeys((*NEEDS[kind], *also)):
        value = scaling.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < _MOST:
            raise ConfigError(
                f"rope_scaling: {kind} needs {name}: expected a positive number; got {value!r}"
            )
    if not theta < _MOST:
        raise ConfigError(f"rope_theta: expected less than {_MOST:g} to be scaled; got {theta}")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ConfigError(
            "rope_scaling: low_freq_factor: expected less than high_freq_factor="
            f"{scaling['high_freq_factor']}; got {scaling['low_freq_factor']}"
        )
    if kind == "dynamic" and D < 4:
        raise ConfigError(f"rope_scaling: dynamic needs two pairs to turn; got {D // 2}")
    if kind == "yarn" and theta <= 1:
        raise ConfigError(f"rope_theta: yarn needs more than 1; got {theta}")
    if kind == "longrope":
        if scaling["original_max_position_embeddings"] <= 1:
            raise ConfigError(
                "rope_scaling: original_max_position_embeddings: expected more than 1; got "
                f"{scaling['original_max_position_embeddings']}"
            )
        for name in ("short_factor", "long_factor"):
            _check_divisors(name, scaling.get(name), D // 2)


def _check_divisors(name: str, value: object, count: int) -> None:
    if (
        not isinstance(value, Sequence)
        or len(value) != count
        or not all(isinstance(v, int | float) and 0 < v < math.inf for v in value)
    ):
        raise ConfigError(
            f"rope_scaling: longrope needs {name}: expected {count} positive numbers, one for each "
            f"pair; got {f'{len(value)} of them' if isinstance(value, Sequence) else repr(value)}"
        )


def _yarn_ramp(
    D: int, theta: float, scaling: Mapping[str, Any], original: float, device: torch.device | str
) -> Tensor:
    """0 for pairs that turn often over the original context, 1 for slow ones, [D / 2]."""

    def pair(turns: float) -> float:  # which one makes so many turns
        return D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.get("beta_fast") or 32), pair(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    along = torch.arange(D // 2, dtype=torch.float32, device=device)
    return ((along - low) / ((high - low) or 0.001)).clamp(0, 1)


def _yarn_length(scaling: Mapping[str, Any]) -> float:
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    def at(mscale: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * mscale * math.log(scaling["factor"]) + 1

    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return at(over) / at(under) if over and under else at(1)


def _longrope_length(scaling: Mapping[str, Any], original: float, context: int) -> float:
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    factor = scaling.get("factor") or context / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
