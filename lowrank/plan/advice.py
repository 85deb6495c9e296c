"""What fits a card: the largest batch and length, and the changes that cost least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from lowrank.adapters.config import LoRAConfig
from lowrank.plan.cards import Card
from lowrank.plan.memory import MemoryPlan, Planner, Settings
from lowrank.quant import get

_MOST_ROWS, _MOST_TOKENS = 1 << 16, 1 << 20  # nobody asks for more


class Remedy(NamedTuple):
    """Changes of a run by the names of its settings, what they cost, and the plan with them."""

    changes: dict[str, Any]
    cost: str
    plan: MemoryPlan


class Advice(NamedTuple):
    """What a card has room for: the largest batch and the largest length with all else as it is.

    0 where nothing has room. The `remedies` of a run that has none, the cheapest first.
    """

    largest_batch: int
    largest_length: int
    remedies: list[Remedy]


def advise(planner: Planner, settings: Settings, card: Card) -> Advice:
    """What to know of a run with these settings on such a card."""
    settings = planner.settings(settings)

    def lacks(name: str) -> Callable[[int], int]:
        return lambda n: planner.plan(replace(settings, **{name: n})).peak - card.total

    fits = planner.plan(settings).fits(card)
    most = min(_MOST_TOKENS, planner.config.max_position_embeddings)
    return Advice(
        _largest(lacks("per_device_train_batch_size"), 1, _MOST_ROWS),
        _largest(lacks("max_length"), 2, max(2, most)),
        [] if fits else _remedies(planner, settings, card),
    )


def _remedies(planner: Planner, settings: Settings, card: Card) -> list[Remedy]:
    """Single changes that suffice; if none does, a set of them that does, none of them idle."""
    found = []
    for changes, cost in _changes(settings):
        plan = planner.plan(replace(settings, **changes))
        if plan.fits(card):
            found.append(Remedy(changes, cost, plan))
    if found:
        return found
    taken: list[tuple[dict[str, Any], str]] = []
    now = settings
    while not planner.plan(now).fits(card):
        left = _changes(now)
        if not left:
            return []
        taken.append(left[0])
        now = replace(now, **left[0][0])
    for change in list(taken):
        others = [other for other in taken if other is not change]
        if planner.plan(_changed(settings, others)).fits(card):
            taken = others
    plan = planner.plan(_changed(settings, taken))
    costs = dict.fromkeys(cost for _, cost in taken)
    return [Remedy({k: v for c, _ in taken for k, v in c.items()}, "; ".join(costs), plan)]


def _changed(settings: Settings, changes: list[tuple[dict[str, Any], str]]) -> Settings:
    for change, _ in changes:
        settings = replace(settings, **change)
    return settings


def _changes(s: Settings) -> list[tuple[dict[str, Any], str]]:
    """What can still be changed, from what costs nothing of what is learned to what does."""
    changes: list[tuple[dict[str, Any], str]] = []
    size, batches = s.per_device_train_batch_size, s.gradient_accumulation_steps
    if s.gradient_checkpointing is False:
        changes.append(({"gradient_checkpointing": "selective"}, "some more time"))
    if size > 1:
        halved = {
            "per_device_train_batch_size": size // 2,
            "gradient_accumulation_steps": batches * -(-size // (size // 2)),
        }
        changes.append((halved, "learns the same"))
    if s.gradient_checkpointing is not True:
        changes.append(({"gradient_checkpointing": True}, "more time"))
    if "8bit" not in s.optim and s.optim != "sgd":
        kind = "lion" if "lion" in s.optim else "adamw"
        changes.append(({"optim": f"paged_{kind}_8bit"}, "states in 8 bits"))
    if s.lora is not None and s.quantizer is None:
        changes.append(({"quantizer": get("nf4")}, "weights in 4 bits"))
    if s.lora is not None and s.quantizer is not None and not s.embeddings:
        changes.append(({"embeddings": True}, "the embedding in 4 bits too"))
    if s.lora is None:
        lora = LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear")
        changes.append(({"lora": lora, "quantizer": get("nf4")}, "an adapter learns, not all"))
    if s.max_length > 256:
        changes.append(({"max_length": s.max_length // 2}, "longer examples are cut"))
    return changes


def _largest(lacks: Callable[[int], int], least: int, most: int) -> int:
    """The largest n of least <= n <= most with lacks(n) <= 0, or 0; it grows about evenly with n,
    so that few are asked.
    """
    low, below = least, lacks(least)
    if below > 0 or least == most:
        return least if below <= 0 else 0
    slope = max(1, lacks(least + 1) - below)
    high = min(most, least + 2 + 2 * -below // slope)
    above = lacks(high)
    if above <= 0:
        return high
    while high - low > 1:
        guess = low + int((high - low) * -below / (above - below))
        guess = min(max(guess, low + 1), high - 1)
        found = lacks(guess)
        if found <= 0:
            low, below = guess, found
        else:
            high, above = guess, found
    return low
