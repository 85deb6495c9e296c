"""The adapter_config.json of an adapter in a model, and whether one read from a file agrees."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.adapters import registry
from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, FileFormatError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.quant_linear import is_conv1d

from .json_files import read_json

CONFIG_FILE = "adapter_config.json"

_log = logging.getLogger(__name__)


def config_of(model: nn.Module, layers: Mapping[str, AdaptedLayer], adapter: str) -> LoRAConfig:
    """The adapter's config; on names, rank and alpha the layers have the last word."""
    config = next(iter(layers.values())).config[adapter]
    if config.target_modules is None:  # layers that were built by hand
        config = replace(config, target_modules=list(layers))
    ranks = {
        n: layer.r[adapter] for n, layer in layers.items() if layer.r[adapter] != config.rank(n)
    }
    alphas = {
        n: layer.lora_alpha[adapter]
        for n, layer in layers.items()
        if layer.lora_alpha[adapter] != config.alpha(n)
    }
    return replace(
        config,
        rank_pattern={**_escaped(ranks), **config.rank_pattern},
        alpha_pattern={**_escaped(alphas), **config.alpha_pattern},
        base_model_name_or_path=config.base_model_name_or_path
        or getattr(model, "name_or_path", None)
        or None,
    )


def config_text(model: nn.Module, config: LoRAConfig, layers: Mapping[str, AdaptedLayer]) -> str:
    """The content of adapter_config.json."""
    content = config.to_peft()
    bases = [layer.unmerged_base for layer in layers.values()]
    # which PEFT would else find out itself, with a warning
    content["fan_in_fan_out"] = any(getattr(b, "fan_in_fan_out", is_conv1d(b)) for b in bases)
    if config.task_type is None:  # how PEFT finds the model's class again
        content["auto_mapping"] = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        }
    return json.dumps(content, indent=2, sort_keys=True)


def read_config(path: Path) -> LoRAConfig:
    """The config in an adapter_config.json. Raises FileFormatError."""
    try:
        return LoRAConfig.from_peft(read_json(path))
    except ConfigError as error:
        raise FileFormatError(f"{path}: {error}") from error


def warn_of_other_base(model: nn.Module, config: LoRAConfig, directory: Path) -> None:
    """Log a warning if the adapter was trained on a model of another name."""
    here, there = getattr(model, "name_or_path", None), config.base_model_name_or_path
    if here and there and Path(here).name != Path(there).name:
        _log.warning("%s was trained on %s; the model is %s", directory, there, here)


def check_agrees(
    layers: Mapping[str, AdaptedLayer], config: LoRAConfig, adapter: str, directory: Path
) -> None:
    """Raises FileFormatError unless the adapter in the model is one of this config."""
    parts = list(registry.get(config.method).shapes(1, 1, 1))  # LoRA-FA's are LoRA's
    for name, layer in layers.items():
        mine = layer.config[adapter]
        there = (layer.r[adapter], layer.lora_alpha[adapter], list(layer.tensors(adapter)))
        here = (config.rank(name), config.alpha(name), parts)
        there, here = (
            (*of, *(getattr(c, field) for field in _ALIKE))
            for of, c in ((there, mine), (here, config))
        )
        if there != here:
            raise FileFormatError(
                f"{directory}: {name} has (r, lora_alpha, tensors, {', '.join(_ALIKE)}) = {here}, "
                f"adapter {adapter!r} in the model {there}; "
                "load it under another name, or delete_adapter first"
            )
        if mine.starts_from_weight and not config.starts_from_weight:
            raise FileFormatError(
                f"{directory}: made for the base as it was; adapter {adapter!r} of the model has "
                f"changed it (init_lora_weights={mine.init_lora_weights!r}); load the model anew"
            )
        if layer.merged:
            raise ConfigError(
                "load_adapter: the adapters of the model are merged: call unmerge first"
            )


# What must be the same of two configs for one to take the other's tensors.
_ALIKE = ("use_rslora", "bias", "modules_to_save", "trainable_token_indices")


def _escaped(names: dict[str, Any]) -> dict[str, Any]:
    return {f"^{re.escape(name)}": value for name, value in names.items()}
