"""What each field of TrainConfig may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from lowrank.errors import ConfigError
from lowrank.train.optimizer import OPTIMIZERS
from lowrank.train.schedule import SCHEDULES


class Rule(NamedTuple):
    """What a value is expected to be, of which types, and the test of its value."""

    expected: str
    types: tuple[type, ...]
    allowed: Callable[[Any], bool] = lambda value: True


def one_of(known: Iterable[str]) -> Rule:
    """One of these words."""
    words = list(known)
    return Rule(f"one of {', '.join(words)}", (str,), lambda v: v in words)


def optional(rule: Rule) -> Rule:
    """That, or None."""
    return Rule(
        f"None or {rule.expected}",
        (*rule.types, type(None)),
        lambda v: v is None or rule.allowed(v),
    )


NUMBER = (int, float)
SWITCH = Rule("true or false", (bool,))
WHOLE = Rule("a whole number of at least 1", (int,), lambda v: v >= 1)
NOT_NEGATIVE = Rule("a number of at least 0", NUMBER, lambda v: 0 <= v < math.inf)
POSITIVE = Rule("a number above 0", NUMBER, lambda v: 0 < v < math.inf)
BELOW_ONE = Rule("a number from 0 to below 1", NUMBER, lambda v: 0 <= v < 1)
SEED = Rule("a whole number from 0 to below 2**63", (int,), lambda v: 0 <= v < 2**63)

# a field whose default is true or false is a SWITCH and need not be here
RULES: dict[str, Rule] = {
    "output_dir": Rule("a path", (str, Path), lambda v: bool(str(v))),
    "learning_rate": NOT_NEGATIVE,
    "lr_scheduler_type": one_of(SCHEDULES),
    "warmup_ratio": Rule("a number from 0 to 1", NUMBER, lambda v: 0 <= v <= 1),
    "warmup_steps": Rule(
        "a whole number of steps, or a share below 1",
        NUMBER,
        lambda v: 0 <= v < math.inf and (v < 1 or v == int(v)),
    ),
    "num_train_epochs": Rule("a number above 0 and below 2**31", NUMBER, lambda v: 0 < v < 2**31),
    "max_steps": Rule("-1, or a whole number of at least 1", (int,), lambda v: v == -1 or v >= 1),
    "per_device_train_batch_size": WHOLE,
    "per_device_eval_batch_size": WHOLE,
    "gradient_accumulation_steps": WHOLE,
    "optim": one_of(OPTIMIZERS),
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": BELOW_ONE,
    "adam_beta2": BELOW_ONE,
    "adam_epsilon": NOT_NEGATIVE,
    "loraplus_lr_ratio": optional(POSITIVE),
    "loraplus_lr_embedding": POSITIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "max_length": WHOLE,
    "eval_steps": optional(WHOLE),
    "logging_steps": WHOLE,
    "seed": SEED,
}


def check_fields(config: Any) -> None:
    """ConfigError naming the first field of the dataclass whose value cannot be."""
    for field in fields(config):
        rule = SWITCH if isinstance(field.default, bool) else RULES[field.name]
        value = getattr(config, field.name)
        # a bool is an int to isinstance, and no number to us
        of_type = isinstance(value, rule.types) and (bool in rule.types) >= isinstance(value, bool)
        if not of_type or not rule.allowed(value):
            raise ConfigError(f"{field.name} must be {rule.expected}; got {value!r}")
