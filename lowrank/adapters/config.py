"""The settings of an adapter: PEFT's names, PEFT's defaults, checked when they are made."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lowrank.errors import ConfigError

from .registry import names

INITS = (True, False, "gaussian", "loftq", "pissa")
BIASES = ("none", "lora_only", "all")
_LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}  # PEFT's defaults
TASKS = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# Keys of adapter_config.json that are no field here, with the values PEFT 0.21.2 writes by default.
_PEFT_REST: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "auto_mapping": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "fan_in_fan_out": False,
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# Of those, the ones that change what the layer computes: a file that sets one of them is refused.
_PEFT_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
# Initialisations that leave the base as it was: once trained, such an adapter is plain LoRA.
_PEFT_PLAIN_INITS = ("eva", "orthogonal")

_PATTERN = r"(.*\.)?({})$"  # what a key of rank_pattern or alpha_pattern stands for


@dataclass
class LoRAConfig:
    """What to adapt and how: y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ, with s = lora_alpha / r.

    r: the rank R of each update.
    method: the kind of adapter, by the name it is registered as (`lowrank.adapters.names()`).
    lora_alpha: the numerator of the scale s.
    target_modules: names or suffixes of names; a str is a regex for the whole name
      (`re.fullmatch`), and "all-linear" means every linear layer but the output head.
      None: q_proj and v_proj.
    exclude_modules: the same two rules; wins over target_modules.
    lora_dropout: probability of dropping each element of x on the way to A, in training.
    rank_pattern, alpha_pattern: {name, suffix or regex: value} for layers that differ; the first
      that matches wins.
    modules_to_save, use_dora: PEFT's; not supported, None and False only.
    layers_to_transform: indices of the blocks to adapt, counted in the ModuleList `layers_pattern`
      (None: the first one in the name).
    layers_pattern: names of such a ModuleList.
    task_type, base_model_name_or_path, revision: noted in adapter_config.json.
    inference_mode: inject the adapter frozen; nothing trains.
    use_rslora: s = lora_alpha / sqrt(r).
    bias: which of the base's biases train and are saved: none, lora_only (the targets') or all.
    init_lora_weights: True (A uniform, B zero), "gaussian" (A normal, B zero), False (neither is
      zero); over weights that are quantized for it, "loftq" (what quantizing loses), "pissa" (the
      principal part, the base being the rest) or "pissa_niter_4" (that by a fast SVD).
    loftq_config: for loftq and pissa, {"loftq_iter": times that quantizing and SVD alternate (1)};
      the quantizer says how many bits, loftq_bits is for PEFT's eyes.

    Raises ConfigError on any value that is out of range or not supported.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    loftq_config: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    method: str = "lora"

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        _check_choice("method", self.method, tuple(names()))
        _check_number("lora_alpha", self.lora_alpha)
        _check_number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout: expected 0 <= p < 1; got {self.lora_dropout!r}")
        for name in ("use_rslora", "use_dora", "inference_mode"):
            _check_choice(name, getattr(self, name), (True, False))
        _check_choice("bias", self.bias, BIASES)
        if not _is_fast_pissa(self.init_lora_weights):
            _check_choice("init_lora_weights", self.init_lora_weights, INITS)
        self.loftq_config = _loftq(self.loftq_config, self.init_lora_weights)
        if self.use_dora:
            raise ConfigError(
                "use_dora: expected False (LoRA and use_rslora are supported); got True"
            )
        if self.modules_to_save:
            raise ConfigError(
                "modules_to_save: expected None, whole trained modules are not supported "
                f"(adapt linear layers through target_modules); got {self.modules_to_save!r}"
            )
        self.task_type = _task(self.task_type)
        self.target_modules = _names("target_modules", self.target_modules)
        self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        self.layers_pattern = _names("layers_pattern", self.layers_pattern)
        for pattern in self.layers_pattern if isinstance(self.layers_pattern, list) else []:
            _check_regex("layers_pattern", pattern)
        for name in ("base_model_name_or_path", "revision"):
            setattr(self, name, _text(name, getattr(self, name)))
        _check_layers(self.layers_to_transform, self.layers_pattern, self.target_modules)
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_number)):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping):
                raise ConfigError(
                    f"{name}: expected a dict from module names to numbers; got {pattern!r}"
                )
            for key, value in pattern.items():
                _check_regex(name, key, _PATTERN)
                check(f"{name}[{key!r}]", value)

    def rank(self, name: str) -> int:
        """R of the layer called `name`."""
        return _first_match(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        """alpha of the layer called `name`."""
        return _first_match(self.alpha_pattern, name, self.lora_alpha)

    @property
    def starts_from_weight(self) -> bool:
        """Whether the adapter starts with a part of the weight, and the base with the rest."""
        return self.init_lora_weights == "loftq" or self.starts_as_principal_part

    @property
    def starts_as_principal_part(self) -> bool:
        """Whether that part is the largest there is, so that the base alone is no model."""
        return self.init_lora_weights == "pissa" or _is_fast_pissa(self.init_lora_weights)

    def with_fresh_start(self) -> LoRAConfig:
        """This config, but for an adapter that does not start from the weight."""
        if not self.starts_from_weight:
            return self
        return replace(self, init_lora_weights=True, loftq_config={})

    def to_peft(self) -> dict[str, Any]:
        """The content of PEFT's adapter_config.json; an adapter on disk is always for inference."""
        return {
            **_PEFT_REST,
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "method"},
            "inference_mode": True,
        }

    @classmethod
    def from_peft(cls, content: Mapping[str, Any]) -> LoRAConfig:
        """The config in PEFT's adapter_config.json; unknown keys are ignored, missing ones default.

        Raises ConfigError if the file asks for something that would change what the layers compute.
        """
        if content.get("peft_type") != "LORA":
            raise ConfigError(f'peft_type: expected "LORA"; got {content.get("peft_type")!r}')
        for key in _PEFT_REFUSED:
            if content.get(key):
                raise ConfigError(
                    f"{key}: is not supported, expected {_PEFT_REST[key]!r}; got {content[key]!r}"
                )
        known = {f.name: content[f.name] for f in fields(cls) if content.get(f.name) is not None}
        if known.get("init_lora_weights") in _PEFT_PLAIN_INITS:
            known["init_lora_weights"] = True
        if not str(known.get("init_lora_weights")).startswith(("loftq", "pissa")):
            known.pop("loftq_config", None)  # left there by who set the other to True afterwards
        return cls(**{**known, "inference_mode": False})


def pattern_matches(key: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means the layer called `name`."""
    return re.match(_PATTERN.format(key), name) is not None


def _check_rank(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ConfigError(f"{name}: expected an integer rank of at least 1; got {value!r}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name}: expected a finite number; got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if not any(type(value) is type(c) and value == c for c in choices):
        raise ConfigError(f"{name}: expected one of {', '.join(map(repr, choices))}; got {value!r}")


def _is_fast_pissa(value: Any) -> bool:
    """pissa_niter_ and a number, PEFT's spelling of PiSSA by a fast SVD."""
    return isinstance(value, str) and re.fullmatch(r"pissa_niter_\d+", value) is not None


def _loftq(value: Any, init: bool | str) -> dict[str, int]:
    value = vars(value) if hasattr(value, "loftq_iter") else value  # PEFT's LoftQConfig
    if not isinstance(value, Mapping) or value.keys() - _LOFTQ.keys():
        raise ConfigError(f"loftq_config: expected a dict of {', '.join(_LOFTQ)}; got {value!r}")
    for key, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"{key}: expected an integer of at least 1; got {number!r}")
    if init == "loftq":
        return {**_LOFTQ, **value}
    if value and init != "pissa" and not _is_fast_pissa(init):
        raise ConfigError(
            "loftq_config: expected {}, it belongs to init_lora_weights='loftq' or 'pissa'; "
            f"got {value!r} with {init!r}"
        )
    return dict(value)


def _check_regex(name: str, pattern: Any, form: str = "{}") -> None:
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"{name}: expected names or a regex; got {pattern!r}")
    try:
        re.compile(form.format(pattern))
    except re.error as error:
        raise ConfigError(f"{name}: {pattern!r} is not a regular expression ({error})") from error


def _names(name: str, value: Any) -> list[str] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        _check_regex(name, value)
        return value
    if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes):
        raise ConfigError(f"{name}: expected a list of names, a regex, or None; got {value!r}")
    value = list(value)
    if not value or not all(isinstance(v, str) and v for v in value):
        raise ConfigError(
            f"{name}: expected at least one name, each a non-empty string; got {value!r}"
        )
    return list(dict.fromkeys(value))


def _text(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{name}: expected text or None; got {value!r}")
    return None if value is None else os.fspath(value)


def _task(value: Any) -> str | None:
    value = getattr(value, "value", value)  # PEFT's TaskType is an enum of strings
    if value is not None and value not in TASKS:
        raise ConfigError(f"task_type: expected None or one of {', '.join(TASKS)}; got {value!r}")
    return value


def _check_layers(layers: Any, pattern: Any, targets: Any) -> None:
    if layers is None:
        if pattern is not None:
            raise ConfigError(
                f"layers_pattern: expected None without layers_to_transform; got {pattern!r}"
            )
        return
    indices = [layers] if isinstance(layers, int) else layers
    if (
        not isinstance(indices, list | tuple)
        or not indices
        or any(type(i) is not int or i < 0 for i in indices)
    ):
        raise ConfigError(
            f"layers_to_transform: expected block indices of at least 0; got {layers!r}"
        )
    if isinstance(targets, str):
        raise ConfigError(
            f"layers_to_transform: expected target_modules as a list; got the regex {targets!r}"
        )


def _first_match(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((v for key, v in pattern.items() if pattern_matches(key, name)), default)
