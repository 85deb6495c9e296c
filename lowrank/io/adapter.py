"""Adapters on disk in PEFT's format: adapter_config.json, adapter_model.safetensors, README.md.

A tensor's key is `base_model.model.` + the module's name + `.lora_A.weight` or `.lora_B.weight`, or
DoRA's `.lora_magnitude_vector`, or what else its kind of layer says (`file_shapes`); the adapter's
name is not in the file. Trained biases are there too: a targeted layer's as
`<module>.base_layer.bias`, others (bias="all") under their plain names.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters import registry
from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, FileFormatError, TargetError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.kinds import kind_of
from lowrank.quant import Quantizer
from lowrank.surgery.inject import attach
from lowrank.surgery.start import check_start
from lowrank.surgery.targets import adapted_layers, check_adapters, find_targets, walk

from .atomic import write_files
from .base import check_made, is_base_to_be_made, metadata_of, read_numbers
from .hub import fetch_files, is_repo_id
from .json_files import read_json
from .safetensors import load_safetensors, write_safetensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
PREFIX = "base_model.model."

_log = logging.getLogger(__name__)


def save_adapter(model: nn.Module, path: str | Path, adapter: str = "default") -> Path:
    """Write one adapter as PEFT does: "default" into `path` itself, others into `path`/`adapter`.

    Returns that directory. Each file appears whole; an adapter that was there before survives any
    failure. Raises TargetError if the model has no such adapter.
    """
    check_adapters(model, [adapter])
    directory = Path(path) if adapter == "default" else Path(path) / adapter
    if directory.exists() and not directory.is_dir():
        raise FileFormatError(f"{directory}: expected a directory or nothing there; it is a file")
    layers = {
        name: layer for name, layer in adapted_layers(model).items() if adapter in layer.config
    }
    config = _config_of(model, layers, adapter)
    content = config.to_peft()
    if config.task_type is None:  # how PEFT finds the model's class again
        content["auto_mapping"] = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        }
    tensors = {PREFIX + name: p for name, p in _tensors(model, layers, config, adapter).items()}
    metadata = metadata_of(layers) if config.starts_from_weight else {}
    text = json.dumps(content, indent=2, sort_keys=True)
    write_files(
        directory,
        {
            CARD_FILE: lambda aside: _write(aside, _card(config)),
            WEIGHTS_FILE: lambda aside: write_safetensors(aside, tensors, metadata),
            CONFIG_FILE: lambda aside: _write(aside, text),
        },
    )
    return directory


def load_adapter(
    model: nn.Module,
    path_or_repo: str | Path,
    adapter: str = "default",
    is_trainable: bool = False,
    revision: str | None = None,
    quantizer: str | Quantizer | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Read an adapter that PEFT or we wrote, from a directory or a hub id, into the model.

    If the model has no such adapter it is created: active if it is the first, frozen unless
    `is_trainable`. If it has, its weights are replaced, and its config must agree.

    An adapter that started with a part of the weights (LoftQ, PiSSA) belongs to the base that was
    left. Unless the model has that base, it is made again from the original weights, which takes
    what `inject` took: a `quantizer` for an unquantized model, `weights` for a quantized one.

    Returns the model. Raises FileFormatError, with the model as it was, for damaged files and for
    an adapter of another base: keys missing or left over, shapes that do not fit, or a base that
    is not the one it was trained over.
    """
    directory = _directory(path_or_repo, revision)
    config = replace(_read_config(directory / CONFIG_FILE), inference_mode=not is_trainable)
    tensors = _read_tensors(directory)
    layers = adapted_layers(model)
    mine = {name: layer for name, layer in layers.items() if adapter in layer.config}
    _warn_of_other_base(model, config, directory)

    if mine:
        _check_agrees(mine, config, adapter, directory)
    try:
        names = list(mine) or find_targets(model, config)
    except TargetError as error:
        raise FileFormatError(f"{directory}: made for another base model: {error}") from error
    modules = dict(walk(model))
    expected: dict[str, tuple[int, ...]] = {}
    for name in names:
        module = layers[name] if name in layers else modules[name]
        shapes = _file_shapes(module, config, name).items()
        expected.update({f"{name}.{key}": shape for key, shape in shapes})
    biases = _biases(model, names, config)
    expected.update((name, tuple(p.shape)) for name, p in biases.items())
    _check_fits(tensors, expected, directory)

    targets = {name: modules[name] for name in names}
    file = directory / WEIGHTS_FILE
    numbers = read_numbers(file)
    make_base = config.starts_from_weight and is_base_to_be_made(
        file, numbers, model, targets, config, adapter, quantizer, weights
    )

    def fill(name: str, layer: AdaptedLayer) -> None:
        if make_base and numbers is not None:
            check_made(file, numbers, name, layer)
        start = f"{name}."
        layer.from_file(
            adapter, {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
        )

    if mine:
        for name, layer in mine.items():
            fill(name, layer)
    elif make_base:
        attach(model, names, config, adapter, fill, quantizer, weights)
    else:
        fresh = config.with_fresh_start()
        check_start(model, targets, fresh, quantizer, None)
        attach(model, names, fresh, adapter, fill, quantizer)
    for name in names:  # the base is as that left it: a file written from here says so too
        layer = model.get_submodule(name)
        layer.config[adapter] = replace(
            layer.config[adapter],
            init_lora_weights=config.init_lora_weights,
            loftq_config=config.loftq_config,
        )
    with torch.no_grad():
        for name, parameter in biases.items():
            parameter.copy_(tensors[name])
    return model


def _config_of(model: nn.Module, layers: dict[str, AdaptedLayer], adapter: str) -> LoRAConfig:
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


def _escaped(names: dict[str, Any]) -> dict[str, Any]:
    return {f"^{re.escape(name)}": value for name, value in names.items()}


def _tensors(
    model: nn.Module, layers: dict[str, AdaptedLayer], config: LoRAConfig, adapter: str
) -> dict[str, Tensor]:
    tensors = {
        f"{name}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in layer.to_file(adapter).items()
    }
    return {**tensors, **_biases(model, layers, config)}


def _file_shapes(module: nn.Module, config: LoRAConfig, name: str) -> dict[str, tuple[int, ...]]:
    """What a file must have of the layer called `name`, with adapters or to be given one."""
    if isinstance(module, AdaptedLayer):
        return type(module).file_shapes(module.unmerged_base, config, name)
    return kind_of(module).file_shapes(module, config, name)


def _biases(
    model: nn.Module, targets: Iterable[str], config: LoRAConfig
) -> dict[str, nn.Parameter]:
    """The adapter's biases, by the names they have once the targets are wrapped."""
    found = {}
    if config.bias == "none":
        return found
    targets = set(targets)
    for name, module in walk(model):
        bias = module._parameters.get("bias")
        if isinstance(module, AdaptedLayer):
            bias = module.bias
        if isinstance(bias, nn.Parameter) and (name in targets or config.bias == "all"):
            wrapped = name in targets or isinstance(module, AdaptedLayer)
            found[f"{name}.base_layer.bias" if wrapped else f"{name}.bias"] = bias
    return found


def _check_agrees(
    layers: dict[str, AdaptedLayer], config: LoRAConfig, adapter: str, directory: Path
) -> None:
    parts = list(registry.get(config.method).shapes(1, 1, 1))
    for name, layer in layers.items():
        there = (
            layer.r[adapter],
            layer.lora_alpha[adapter],
            layer.config[adapter].use_rslora,
            layer.config[adapter].bias,
            list(layer.tensors(adapter)),
        )
        here = (
            config.rank(name), config.alpha(name), config.use_rslora, config.bias, parts
        )  # fmt: skip
        if there != here:
            raise FileFormatError(
                f"{directory}: {name} has (r, lora_alpha, use_rslora, bias, tensors) = {here}, "
                f"adapter {adapter!r} in the model {there}; "
                "load it under another name, or delete_adapter first"
            )
        if layer.config[adapter].starts_from_weight and not config.starts_from_weight:
            raise FileFormatError(
                f"{directory}: made for the base as it was; adapter {adapter!r} of the model has "
                f"changed it (init_lora_weights={layer.config[adapter].init_lora_weights!r}); load "
                "the model anew"
            )
        if layer.merged:
            raise ConfigError(
                "load_adapter: the adapters of the model are merged: call unmerge first"
            )


def _check_fits(
    tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], directory: Path
) -> None:
    for what, keys in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has no place for", tensors.keys() - expected.keys()),
    ):
        if keys:
            subject = "the file" if what == "lacks" else "the model"
            some = ", ".join(sorted(keys)[:3])
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise FileFormatError(
                f"{directory}: made for another base model: {subject} {what} {some}{more}"
            )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise FileFormatError(
                f"{directory}: made for another base model: {name} is {list(tensor.shape)}, "
                f"the model takes {list(shape)}"
            )
        if not tensor.is_floating_point():
            raise FileFormatError(
                f"{directory}: {name}: expected floating-point weights; got {tensor.dtype}"
            )


def _warn_of_other_base(model: nn.Module, config: LoRAConfig, directory: Path) -> None:
    here, there = getattr(model, "name_or_path", None), config.base_model_name_or_path
    if here and there and Path(here).name != Path(there).name:
        _log.warning("%s was trained on %s; the model is %s", directory, there, here)


def _read_config(path: Path) -> LoRAConfig:
    try:
        return LoRAConfig.from_peft(read_json(path))
    except ConfigError as error:
        raise FileFormatError(f"{path}: {error}") from error


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.exists() and (directory / "adapter_model.bin").exists():
        raise FileFormatError(
            f"{directory}: adapter_model.bin is a pickle, which can run code; where you trust it, "
            "load it with PEFT and save_pretrained(..., safe_serialization=True) again"
        )
    tensors = load_safetensors(path)
    for name in tensors:
        if not name.startswith(PREFIX):
            raise FileFormatError(f"{path}: expected keys that start with {PREFIX}; got {name}")
    return {name[len(PREFIX) :]: tensor for name, tensor in tensors.items()}


def _directory(path_or_repo: str | Path, revision: str | None) -> Path:
    path = Path(path_or_repo)
    if path.is_dir():
        return path
    if path.exists():
        raise FileFormatError(f"{path}: expected the directory of an adapter; it is a file")
    if not is_repo_id(str(path_or_repo)):
        raise FileFormatError(
            f"{path_or_repo}: no such directory, and not a hub id of the form owner/name"
        )
    return fetch_files(str(path_or_repo), [CONFIG_FILE, WEIGHTS_FILE], revision)


def _write(path: Path, text: str) -> None:
    # a name of the base that is no UTF-8 must not cost the adapter
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _card(config: LoRAConfig) -> str:
    base = config.base_model_name_or_path
    targets = (
        config.target_modules
        if isinstance(config.target_modules, str)
        else ", ".join(config.target_modules)
    )
    stabilized = ", rank-stabilized" if config.use_rslora else ""
    head = [
        "library_name: peft",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        "tags:",
        "- lora",
        "- lowrank",
    ]
    return "\n".join(
        [
            "---",
            *head,
            "---",
            "",
            f"# LoRA adapter{f' for {base}' if base else ''}",
            "",
            f"Rank {config.r}, alpha {config.lora_alpha:g}{stabilized}, on {targets}.",
            "",
            "```python",
            'lowrank.load_adapter(model, "path/to/this/directory")',
            "```",
            "",
        ]
    )
