"""PEFT's names for an adapter's settings: its LoraConfig's, and the keys of adapter_config.json."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from lowrank.errors import ConfigError

from .checks import strategy
from .registry import get

_C = TypeVar("_C", bound=type)
_OWN_TYPE = "LOWRANK"  # of methods whose tensors PEFT has other names for, or none
_OURS = ("method", "target_rows")  # fields that PEFT has not

# Keys of adapter_config.json that are no field here, with the values PEFT 0.21.2 writes by default.
_REST: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "auto_mapping": None,
    "corda_config": None,
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
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# Of those, the ones that change what the layer computes: a file that sets one of them is refused.
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
# Of those, the ones that say nothing a layer does not know better: whatever they are is right.
_IDLE = ("auto_mapping", "fan_in_fan_out", "megatron_core", "peft_version", "qalora_group_size")
# Initialisations that leave the base as it was: once trained, such an adapter is plain LoRA.
_PLAIN_INITS = ("eva", "orthogonal")


def takes_peft_fields(cls: _C) -> _C:
    """Class decorator: the dataclass also takes the rest of PEFT's fields, at their defaults.

    So what a tutorial passes to LoraConfig can be passed here. Raises ConfigError for one at
    another value than its default, and for unknown names, with the nearest there is.
    """
    init, own = cls.__init__, [field.name for field in fields(cls)]

    @functools.wraps(init)
    def __init__(self, *args, **given):
        for name in [name for name in given if name not in own]:
            _check_rest(name, given.pop(name), own)
        init(self, *args, **given)

    cls.__init__ = __init__
    return cls


def to_peft(config: Any) -> dict[str, Any]:
    """The content of PEFT's adapter_config.json; an adapter on disk is always for inference."""
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _OURS}
    content = {**_REST, **own, "inference_mode": True}
    if not getattr(get(config.method), "is_lora", False):  # PEFT shall not take it for LoRA
        content |= {"peft_type": _OWN_TYPE, "method": config.method}
    return content


def from_peft(content: Mapping[str, Any], own: list[str]) -> dict[str, Any]:
    """Of PEFT's adapter_config.json, the fields `own`; unknown keys are ignored.

    Raises ConfigError if the file asks for something that would change what the layers compute.
    """
    if content.get("peft_type") not in ("LORA", _OWN_TYPE):
        raise ConfigError(f'peft_type: expected "LORA"; got {content.get("peft_type")!r}')
    for key in _REFUSED:
        if content.get(key):
            raise ConfigError(
                f"{key}: is not supported, expected {_REST[key]!r}; got {content[key]!r}"
            )
    known = {name: content[name] for name in own if content.get(name) is not None}
    if known.get("init_lora_weights") in _PLAIN_INITS:
        known["init_lora_weights"] = True
    if known.get("init_lora_weights") != "eva":
        known.pop("eva_config", None)
    if not str(known.get("init_lora_weights")).startswith(("loftq", "pissa")):
        known.pop("loftq_config", None)  # left there by who set the other to True afterwards
    targets = known.get("target_modules")
    if targets is not None and strategy(targets) not in (None, "all-linear"):
        known["target_modules"] = f"(?:{targets})"  # a word of ours alone; there, a regex
    return {**known, "inference_mode": False}


def _check_rest(name: str, value: Any, own: list[str]) -> None:
    if name == "runtime_config":  # PEFT's, of what to offload meanwhile; it is not saved
        value = getattr(value, "ephemeral_gpu_offload", value)
    elif name not in _REST:
        near = difflib.get_close_matches(name, [*own, *_REST], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(own)}"
        raise ConfigError(f"{name}: LoRAConfig has no such field; {hint}")
    value = getattr(value, "value", value)  # PEFT's PeftType is an enum of strings
    if value and name not in _IDLE and value != _REST.get(name):
        raise ConfigError(f"{name}: is not supported, expected {_REST.get(name)!r}; got {value!r}")
