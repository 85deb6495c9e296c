"""What each optimizer keeps of a parameter, and takes in its step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import ConfigError
from lowrank.optim.budget import SLOTS, Budget
from lowrank.optim.pages import chunk_bytes
from lowrank.optim.resident import MIN_8BIT_SIZE
from lowrank.optim.rules import ADAMW, ADAMW_8BIT, LION, LION_8BIT, Rule


class Kind(NamedTuple):
    """An optimizer by what it computes (None: nothing is kept), and where it keeps its state."""

    rule: Rule | None
    paged: bool = False


# by the names of TrainConfig.optim
KINDS = {
    "adamw_torch": Kind(ADAMW),
    "adamw_torch_fused": Kind(ADAMW),
    "adamw_8bit": Kind(ADAMW_8BIT),
    "adamw_bnb_8bit": Kind(ADAMW_8BIT),
    "adamw_torch_8bit": Kind(ADAMW_8BIT),
    "lion_32bit": Kind(LION),
    "lion_8bit": Kind(LION_8BIT),
    "paged_adamw_32bit": Kind(ADAMW, paged=True),
    "paged_adamw_8bit": Kind(ADAMW_8BIT, paged=True),
    "paged_lion_32bit": Kind(LION, paged=True),
    "paged_lion_8bit": Kind(LION_8BIT, paged=True),
    "sgd": Kind(None),
}


class State(NamedTuple):
    """Bytes of all states: on the device, and elsewhere; and what one step takes beside them."""

    device: int
    elsewhere: int
    step: int


def optimizer_state(
    optim: str, parameters: Sequence[Tensor], device_budget: int | None = None
) -> State:
    """What the optimizer of this name takes for these parameters. ConfigError: not of a budget."""
    rule, paged = KINDS[optim]
    if device_budget is not None and not paged:
        raise ConfigError(f"device_budget: belongs to a paged optimizer; got optim={optim!r}")
    if rule is None:
        return State(0, 0, 0)
    total = sum(_bytes(rule, p) for p in parameters)
    step = max((_within_step(rule, p) for p in parameters), default=0)
    if device_budget is None or total <= device_budget:
        return State(total, 0, step)
    budget = Budget(device_budget)
    here = max(device_budget, 2 * chunk_bytes(budget))
    away = total - max(0, here - SLOTS * chunk_bytes(budget))
    return State(min(here, total), away, step)


def _bytes(rule: Rule, p: Tensor) -> int:
    if rule.small is not None and p.numel() < MIN_8BIT_SIZE:
        rule = rule.small
    states = rule.states(p).values()
    return sum(math.prod(state.shape) * state.dtype.itemsize for state in states)


def _within_step(rule: Rule, p: Tensor) -> int:
    """AdamW copies what is not float32; Lion makes its direction out of place, four times p."""
    if rule in (LION, LION_8BIT):
        return 4 * p.numel() * 4 if rule is LION else 0
    return 2 * 4 * p.numel() if rule is ADAMW and p.dtype != torch.float32 else 0
