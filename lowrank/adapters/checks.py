"""What LoRAConfig refuses, a function for each kind of value."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lowrank.errors import ConfigError

TASKS = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
STRATEGIES = ("all-linear", "attention", "minimal")  # target_modules, which are no regexes
EVA = {
    "rho": 2.0, "tau": 0.99, "use_label_mask": True, "label_mask_value": -100, "whiten": False,
    "adjust_scaling_factors": True,
}  # fmt: skip
LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}  # PEFT's defaults
_PATTERN = r"(.*\.)?({})$"  # what a key of rank_pattern or alpha_pattern stands for


def pattern_matches(key: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means the layer called `name`."""
    return re.match(_PATTERN.format(key), name) is not None


def exact_patterns(values: Mapping[str, Any]) -> dict[str, Any]:
    """A rank_pattern or alpha_pattern of {name of a layer: value}, each for that layer alone."""
    return {f"^{re.escape(name)}": value for name, value in values.items()}


def rank(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ConfigError(f"{name}: expected a rank of 1 to 2**31 - 1; got {value!r}")


def number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name}: expected a finite number; got {value!r}")


def alpha(name: str, value: Any) -> None:
    number(name, value)
    if value == 0:
        raise ConfigError(
            f"{name}: expected a number other than 0, with which an adapter does nothing and "
            f"learns nothing; got {value!r}; scale_adapter(model, adapter, 0) turns one off"
        )


def choice(name: str, value: Any, choices: tuple) -> None:
    if not any(type(value) is type(c) and value == c for c in choices):
        raise ConfigError(f"{name}: expected one of {', '.join(map(repr, choices))}; got {value!r}")


def is_fast_pissa(value: Any) -> bool:
    """pissa_niter_ and a number, PEFT's spelling of PiSSA by a fast SVD."""
    return isinstance(value, str) and re.fullmatch(r"pissa_niter_\d+", value) is not None


def loftq(value: Any, init: bool | str) -> dict[str, int]:
    value = vars(value) if hasattr(value, "loftq_iter") else value  # PEFT's LoftQConfig
    if not isinstance(value, Mapping) or value.keys() - LOFTQ.keys():
        raise ConfigError(f"loftq_config: expected a dict of {', '.join(LOFTQ)}; got {value!r}")
    for key, count in value.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"{key}: expected an integer of at least 1; got {count!r}")
    if init == "loftq":
        return {**LOFTQ, **value}
    if value and init != "pissa" and not is_fast_pissa(init):
        raise ConfigError(
            "loftq_config: expected {}, it belongs to init_lora_weights='loftq' or 'pissa'; "
            f"got {value!r} with {init!r}"
        )
    return dict(value)


def eva(value: Any, init: bool | str) -> dict[str, Any] | None:
    value = vars(value) if hasattr(value, "whiten") else value  # PEFT's EvaConfig
    if init != "eva":
        if value is not None:
            raise ConfigError(
                "eva_config: expected None, it belongs to init_lora_weights='eva'; "
                f"got {value!r} with {init!r}"
            )
        return None
    value = {} if value is None else value
    if not isinstance(value, Mapping) or value.keys() - EVA.keys():
        raise ConfigError(f"eva_config: expected a dict of {', '.join(EVA)}; got {value!r}")
    value = {**EVA, **value}
    for key, default in EVA.items():
        if isinstance(default, bool):
            choice(key, value[key], (True, False, 1, 0))  # numbers, on a command line
            value[key] = bool(value[key])
        else:
            number(key, value[key])
    if value["rho"] < 1 or not 0 <= value["tau"] <= 1:
        raise ConfigError(
            f"rho, tau: expected rho >= 1 and 0 <= tau <= 1; got {value['rho']}, {value['tau']}"
        )
    return value


def regex(name: str, pattern: Any, form: str = "{}") -> None:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"{name}: expected names or a regex; got {pattern!r}")
    try:
        re.compile(form.format(pattern))
    except re.error as error:
        raise ConfigError(f"{name}: {pattern!r} is not a regular expression ({error})") from error


def patterns(name: str, value: Any, check: Any) -> None:
    """{name, suffix or regex: a value that `check` takes}."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: expected a dict from module names to numbers; got {value!r}")
    for key, entry in value.items():
        regex(name, key, _PATTERN)
        check(f"{name}[{key!r}]", entry)


def names(name: str, value: Any) -> list[str] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        regex(name, value)
        return value
    if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes):
        raise ConfigError(f"{name}: expected a list of names, a regex, or None; got {value!r}")
    value = list(value)
    if not value or not all(isinstance(v, str) and v for v in value):
        raise ConfigError(
            f"{name}: expected at least one name, each a non-empty string; got {value!r}"
        )
    return list(dict.fromkeys(value))


def spans(name: str, value: Any) -> None:
    """Raises ConfigError unless these are ranges of rows in their order."""
    pairs = value if isinstance(value, list | tuple) else []
    flat = [end for pair in pairs if isinstance(pair, list | tuple) for end in pair]
    right = all(type(end) is int for end in flat) and len(flat) == 2 * len(pairs) > 0
    right = right and flat[0] >= 0 and sorted(flat) == flat
    if not right or any(start == stop for start, stop in pairs):
        raise ConfigError(f"{name}: expected rows as [(start, stop), ...], rising; got {value!r}")


def parameters(value: Any) -> list[str] | None:
    if isinstance(value, str):
        raise ConfigError(f"target_parameters: expected a list of names; got the string {value!r}")
    return names("target_parameters", value or None)


def tokens(value: Any) -> list[int] | dict[str, list[int]] | None:
    """trainable_token_indices: ids, or {name of an embedding: ids}."""
    if value is None:
        return None
    tables = value if isinstance(value, Mapping) else {"": value}
    for ids in tables.values():
        if (
            not isinstance(ids, list | tuple)
            or not ids
            or any(type(i) is not int or i < 0 for i in ids)
            or len(set(ids)) < len(ids)
        ):
            raise ConfigError(
                "trainable_token_indices: expected token ids of at least 0, none of them twice, or "
                f"a dict of such lists by the embedding's name; got {value!r}"
            )
    if not tables or not all(isinstance(name, str) for name in tables):
        raise ConfigError(
            f"trainable_token_indices: expected names of embeddings as keys; got {value!r}"
        )
    return {k: list(v) for k, v in value.items()} if isinstance(value, Mapping) else list(value)


def strategy(targets: list[str] | str) -> str | None:
    """The one of STRATEGIES that target_modules is, in any case."""
    word = targets.lower() if isinstance(targets, str) else None
    return word if word in STRATEGIES else None


def text(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{name}: expected text or None; got {value!r}")
    return None if value is None else os.fspath(value)


def task(value: Any) -> str | None:
    value = getattr(value, "value", value)  # PEFT's TaskType is an enum of strings
    if value is not None and value not in TASKS:
        raise ConfigError(f"task_type: expected None or one of {', '.join(TASKS)}; got {value!r}")
    return value


def layers(indices: Any, pattern: Any, targets: Any) -> None:
    """layers_to_transform, beside layers_pattern and target_modules."""
    if indices is None:
        if pattern is not None:
            raise ConfigError(
                f"layers_pattern: expected None without layers_to_transform; got {pattern!r}"
            )
        return
    several = [indices] if isinstance(indices, int) else indices
    if (
        not isinstance(several, list | tuple)
        or not several
        or any(type(i) is not int or i < 0 for i in several)
    ):
        raise ConfigError(
            f"layers_to_transform: expected block indices of at least 0; got {indices!r}"
        )
    if isinstance(targets, str) and strategy(targets) is None:
        raise ConfigError(
            f"layers_to_transform: expected target_modules as a list; got the regex {targets!r}"
        )
