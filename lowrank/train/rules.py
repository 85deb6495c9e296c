"""What each field of TrainConfig may be."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lowrank.errors import ConfigError
from lowrank.train.distributed import PARALLEL
from lowrank.train.optimizer import BUDGETS, OPTIMIZERS
from lowrank.train.schedule import SCHEDULES, SHAPES
from lowrank.train.trackers import TRACKERS, tracker_names

T = TypeVar("T")


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
SHARE = Rule("a number from 0 to 1", NUMBER, lambda v: 0 <= v <= 1)
STEPS_OR_SHARE = Rule(
    "a whole number of steps, or a share below 1",
    NUMBER,
    lambda v: 0 <= v < math.inf and (v < 1 or v == int(v)),
)
STEPS_OR_PART = Rule(
    "a whole number of at least 1, or a share below it",
    NUMBER,
    lambda v: 0 < v < math.inf and (v < 1 or v == int(v)),
)
BYTES = Rule("a number of bytes, at least two chunks of 65536", (int,), lambda v: v >= 2 << 16)
PATH = Rule("a path", (str, Path), lambda v: bool(str(v)))
TEXT = Rule("a text that is not empty", (str,), bool)
SEED = Rule("a whole number from 0 to below 2**63", (int,), lambda v: 0 <= v < 2**63)

# a field that is not here is a SWITCH
RULES: dict[str, Rule] = {
    "output_dir": PATH,
    "learning_rate": NOT_NEGATIVE,
    "lr_scheduler_type": one_of(SCHEDULES),
    "lr_scheduler_kwargs": optional(Rule("a dict of names", (dict,))),
    "warmup_ratio": SHARE,
    "warmup_steps": STEPS_OR_SHARE,
    "num_train_epochs": Rule("a number above 0 and below 2**31", NUMBER, lambda v: 0 < v < 2**31),
    "max_steps": Rule("-1, or a whole number of at least 1", (int,), lambda v: v == -1 or v >= 1),
    "parallel": optional(one_of(PARALLEL)),
    "ddp_timeout": POSITIVE,
    "per_device_train_batch_size": WHOLE,
    "per_device_eval_batch_size": WHOLE,
    "gradient_accumulation_steps": WHOLE,
    "optim": one_of(OPTIMIZERS),
    "device_budget": optional(BYTES),
    "host_budget": optional(BYTES),
    "page_dir": optional(PATH),
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": BELOW_ONE,
    "adam_beta2": BELOW_ONE,
    "adam_epsilon": NOT_NEGATIVE,
    "loraplus_lr_ratio": optional(POSITIVE),
    "loraplus_lr_embedding": POSITIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "gradient_checkpointing": Rule(
        "true, false or 'selective'", (bool, str), lambda v: v in (True, False, "selective")
    ),
    "torch_compile_backend": optional(Rule("a name", (str,), bool)),
    "label_smoothing_factor": BELOW_ONE,
    "neftune_noise_alpha": optional(POSITIVE),
    "max_length": WHOLE,
    "eval_strategy": optional(one_of(("no", "steps", "epoch"))),
    "eval_steps": optional(STEPS_OR_PART),
    "metric_for_best_model": Rule("a name", (str,), bool),
    "greater_is_better": optional(SWITCH),
    "early_stopping_patience": optional(WHOLE),
    "early_stopping_threshold": NOT_NEGATIVE,
    "assistant_only_loss": optional(SWITCH),
    "chat_template_path": optional(PATH),
    "dataset_text_field": optional(TEXT),
    "token_cache": optional(PATH),
    "save_strategy": one_of(("no", "steps", "epoch")),
    "save_steps": STEPS_OR_PART,
    "save_total_limit": optional(WHOLE),
    "resume": optional(Rule("'auto' or a path", (str, Path), lambda v: bool(str(v)))),
    "logging_steps": STEPS_OR_PART,
    "report_to": Rule(
        f"none or some of {', '.join(TRACKERS)}",
        (str, list, type(None)),
        lambda v: v in (None, "none") or all(n in [*TRACKERS] for n in tracker_names(v)),
    ),
    "project": TEXT,
    "run_name": optional(TEXT),
    "seed": SEED,
    "data_seed": optional(SEED),
}

SCHEDULE_RULES: dict[str, Rule] = {
    "min_lr": NOT_NEGATIVE,
    "min_lr_rate": SHARE,
    "min_lr_ratio": SHARE,
    "num_decay_steps": STEPS_OR_SHARE,
    "decay_type": one_of(SHAPES),
}


def respell(config: Any, other: str, value: Any) -> None:
    """Set the field that `other` is another name of, unless `value` is None."""
    if value is None:
        return
    name = config.SPELLINGS[other]
    default = next(field.default for field in fields(config) if field.name == name)
    if getattr(config, name) not in (default, value):
        raise ConfigError(
            f"{other} is {name} by another name; got {value!r} and {getattr(config, name)!r}: "
            "leave one out"
        )
    setattr(config, name, value)


def refuses_unknown(cls: type[T]) -> type[T]:
    """Class decorator: a keyword that the dataclass has not is a ConfigError with the nearest."""
    init = cls.__init__
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def __init__(self: T, *args: Any, **given: Any) -> None:
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "leave it out"
                raise ConfigError(f"{cls.__name__} has no field {name!r}: {hint}")
        init(self, *args, **given)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


def grouped_by(strategy: Any) -> bool:
    """group_by_length, as transformers says it by now."""
    _check("train_sampling_strategy", one_of(("random", "group_by_length")), strategy)
    return strategy == "group_by_length"


def check_not_reentrant(kwargs: Any) -> None:
    """ConfigError unless gradient_checkpointing_kwargs ask for what recomputing is here."""
    if kwargs not in (None, {}, {"use_reentrant": False}):
        raise ConfigError(
            f"gradient_checkpointing_kwargs: expected use_reentrant=False or nothing, as "
            f"recomputing is never reentrant here; got {kwargs!r:.80}; leave it out"
        )


def check_fields(config: Any) -> None:
    """ConfigError naming the first field of the dataclass whose value cannot be."""
    for field in fields(config):
        _check(field.name, RULES.get(field.name, SWITCH), getattr(config, field.name))


def check_together(config: Any) -> None:
    """ConfigError for fields that can be, but not beside one another."""
    if config.cpu_offload and config.parallel != "fsdp":
        raise ConfigError(f"cpu_offload is for parallel='fsdp'; got {config.parallel!r}")
    for name in ("fp16", "auto_find_batch_size", "activation_offloading"):
        if config.parallel == "fsdp" and getattr(config, name):
            instead = "take bf16" if name == "fp16" else "set per_device_train_batch_size lower"
            raise ConfigError(f"{name} cannot be on where parallel is 'fsdp': {instead}")
    if config.bf16 and config.fp16:
        raise ConfigError("bf16 and fp16 are both on: turn one of them off")
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(config, name) and config.evaluates_by == "no":
            raise ConfigError(
                f"{name} needs evaluations between the steps; got none: "
                "set eval_strategy to 'steps' or 'epoch'"
            )
    for name in BUDGETS:
        if getattr(config, name) is not None and not config.optim.startswith("paged_"):
            raise ConfigError(
                f"{name} is for a paged optimizer; got optim={config.optim!r}: take one of "
                + ", ".join(name for name in OPTIMIZERS if name.startswith("paged_"))
            )
    if config.packing and config.group_by_length:
        raise ConfigError("packing and group_by_length are both on: packs are full, turn one off")
    _check_schedule(config.lr_scheduler_type, config.lr_scheduler_kwargs or {}, config)


def _check_schedule(name: str, options: Mapping[str, Any], config: Any) -> None:
    known = list(SCHEDULES[name].options)
    known += ["min_lr"] * ("min_lr_rate" in known)
    for option, value in options.items():
        if option not in known:
            takes = f"{name} takes {', '.join(known)}" if known else f"{name} takes none"
            raise ConfigError(f"lr_scheduler_kwargs has {option!r}, but {takes}: leave it out")
        _check(f"lr_scheduler_kwargs[{option!r}]", SCHEDULE_RULES[option], value)
    if {"min_lr", "min_lr_rate"} <= set(options):
        raise ConfigError("lr_scheduler_kwargs has min_lr and min_lr_rate: leave one of them out")
    if options.get("min_lr", 0) > config.learning_rate:
        raise ConfigError(
            f"lr_scheduler_kwargs['min_lr'] must be at most learning_rate={config.learning_rate}; "
            f"got {options['min_lr']}"
        )


def _check(name: str, rule: Rule, value: Any) -> None:
    # a bool is an int to isinstance, and no number to us
    of_type = isinstance(value, rule.types) and (bool in rule.types) >= isinstance(value, bool)
    if not of_type or not rule.allowed(value):
        raise ConfigError(f"{name} must be {rule.expected}; got {value!r}")
