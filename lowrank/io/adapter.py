"""Adapters on disk in PEFT's format: adapter_config.json, adapter_model.safetensors, README.md.

A tensor's key is `base_model.model.` + the module's name + what the kind of layer calls it there,
`.lora_A.weight` for instance; the adapter's name is not in the file. Trained biases are there too:
a targeted layer's as `<module>.base_layer.bias`, others (bias="all") under their plain names. So
are modules that were trained whole, under the names that they have without an adapter.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError, FileFormatError, TargetError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.quant import Quantizer
from lowrank.surgery.inject import attach
from lowrank.surgery.replaced import find_replaced
from lowrank.surgery.start import check_start
from lowrank.surgery.targets import (
    adapted_layers,
    adapted_modules,
    check_adapters,
    find_targets,
    named_bases,
)
from lowrank.surgery.tied import with_twins

from .adapter_card import card
from .adapter_config import (
    CONFIG_FILE,
    check_agrees,
    config_of,
    config_text,
    read_config,
    warn_of_other_base,
)
from .adapter_tensors import (
    PREFIX,
    WEIGHTS_FILE,
    base_weights,
    biases,
    check_fits,
    fill,
    read_tensors,
    shapes_of,
    tensors_of,
)
from .atomic import write_files
from .base import check_made, is_base_to_be_made, metadata_of, read_numbers
from .hub import fetch_files, is_repo_id, push_folder
from .safetensors import write_safetensors

CARD_FILE = "README.md"


def save_adapter(model: nn.Module, path: str | Path, adapter: str = "default") -> Path:
    """Write one adapter as PEFT does: "default" into `path` itself, others into `path`/`adapter`.

    Returns that directory. Each file appears whole; an adapter that was there before survives any
    failure. Raises TargetError if the model has no such adapter, ConfigError while it is merged.
    """
    directory = Path(path) if adapter == "default" else Path(path) / adapter
    _write_adapter(model, directory, adapter)
    return directory


def push_adapter(
    model: nn.Module,
    repo: str,
    adapter: str = "default",
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Add adapter",
    token: str | None = None,
) -> str:
    """Write one adapter into a repository of the hub, `owner/name`, in one commit.

    The repository is made if it is not there, `private` if so asked. Returns the commit's address.
    Raises what `save_adapter` raises, and ConfigError for what the hub refuses.
    """
    if not is_repo_id(repo):
        raise ConfigError(f"repo: expected a hub id of the form owner/name; got {repo!r}")
    with tempfile.TemporaryDirectory() as folder:
        _write_adapter(model, Path(folder), adapter)
        return push_folder(folder, repo, message, private, revision, token)


def adapter_writers(
    model: nn.Module, adapter: str = "default", copied: bool = False
) -> dict[str, Callable[[Path], None]]:
    """What writes each file of an adapter, by its name. Raises what `save_adapter` raises.

    copied: its values as they are now, in main memory, whatever becomes of them until it is called.
    """
    check_adapters(model, [adapter])
    if any(module.merged for module in adapted_modules(model).values()):
        raise ConfigError(
            "save_adapter: expected unmerged layers; the adapters are merged: call unmerge first, "
            "or lowrank.merge_and_unload and save the model"
        )
    layers = {
        name: layer for name, layer in adapted_layers(model).items() if adapter in layer.config
    }
    config = config_of(model, layers, adapter)
    tensors = {PREFIX + name: t for name, t in tensors_of(model, config, adapter).items()}
    if copied:
        tensors = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
    text = config_text(model, config, layers)

    def write_weights(path: Path) -> None:
        metadata = metadata_of(layers) if config.starts_from_weight else {}
        write_safetensors(path, tensors, metadata)

    return {
        CARD_FILE: lambda path: _write(path, card(config)),
        WEIGHTS_FILE: write_weights,
        CONFIG_FILE: lambda path: _write(path, text),
    }


def _write_adapter(model: nn.Module, directory: Path, adapter: str) -> None:
    writers = adapter_writers(model, adapter)
    if directory.exists() and not directory.is_dir():
        raise FileFormatError(f"{directory}: expected a directory or nothing there; it is a file")
    write_files(directory, writers)


def load_adapter(
    model: nn.Module,
    path_or_repo: str | Path,
    adapter: str = "default",
    is_trainable: bool = False,
    revision: str | None = None,
    quantizer: str | Quantizer | None = None,
    weights: Mapping[str, Tensor] | None = None,
    subfolder: str | None = None,
    token: str | None = None,
) -> nn.Module:
    """Read an adapter that PEFT or we wrote, from a directory or a hub id, into the model.

    `subfolder` of it, where there are several. If the model has no such adapter it is created:
    active if it is the first, frozen unless `is_trainable`. If it has, its weights are replaced,
    and its config must agree.

    An adapter that started with a part of the weights (LoftQ, PiSSA, OLoRA) belongs to the base
    that was left. Unless the model has that base, it is made again from the original weights, which
    takes what `inject` took: the unquantized model, with a `quantizer` if there was one, or
    `weights` for a quantized model.

    Returns the model. Raises FileFormatError, with the model as it was, for damaged files and for
    an adapter of another base: keys missing or left over, shapes that do not fit, or a base that
    is not the one it was trained over.
    """
    directory = adapter_directory(path_or_repo, subfolder, revision, token)
    config = replace(read_config(directory / CONFIG_FILE), inference_mode=not is_trainable)
    tensors = read_tensors(directory)
    layers = adapted_layers(model)
    mine = {name: layer for name, layer in layers.items() if adapter in layer.config}
    warn_of_other_base(model, config, directory)

    if mine:
        check_agrees(mine, config, adapter, directory)
    try:
        names = list(mine) or with_twins(model, find_targets(model, config), config)
        replaced = find_replaced(model, config, names)
    except TargetError as error:
        raise FileFormatError(f"{directory}: made for another base model: {error}") from error
    expected = shapes_of(model, config, names, replaced)
    rest = base_weights(model, tensors.keys() - expected.keys())
    shapes = {key: tuple(place.shape) for key, place in rest.items()}
    check_fits(tensors, expected | shapes, directory)

    modules = named_bases(model)
    targets = {name: modules[name] for name in names}
    file = directory / WEIGHTS_FILE
    numbers = read_numbers(file)
    make_base = config.starts_from_weight and is_base_to_be_made(
        file, numbers, model, targets, config, adapter, quantizer, weights
    )

    def check(name: str, layer: AdaptedLayer) -> None:
        if numbers is not None:
            check_made(file, numbers, name, layer)

    if make_base:
        attach(model, names, config, adapter, check, quantizer, weights)
    elif not mine:
        fresh = config.with_fresh_start()
        check_start(model, targets, fresh, quantizer, None)
        attach(model, names, fresh, adapter, quantizer=quantizer)
    if config.starts_from_weight:  # the base is as that left it: a file written from here says so
        start = {"init_lora_weights": config.init_lora_weights, "loftq_config": config.loftq_config}
        for layer in adapted_layers(model).values():
            if adapter in layer.config:
                layer.config[adapter] = replace(layer.config[adapter], **start)
    fill(model, adapter, tensors)
    with torch.no_grad():
        for key, parameter in (biases(model, names, config) | rest).items():
            parameter.copy_(tensors[key])
    return model


def adapter_directory(
    path_or_repo: str | Path, subfolder: str | None, revision: str | None, token: str | None
) -> Path:
    """The directory that an adapter is in, fetched if it is on the hub. Raises FileFormatError."""
    path = Path(path_or_repo)
    if path.is_dir():
        path = path / (subfolder or "")
        if not (path / CONFIG_FILE).exists():
            inside = sorted(p.parent.name for p in path.glob(f"*/{CONFIG_FILE}"))
            if inside:
                raise FileFormatError(
                    f"{path}: expected an adapter in it; there are some in its folders "
                    f"{', '.join(inside[:5])}: pass one of them as subfolder"
                )
        return path
    if path.exists():
        raise FileFormatError(f"{path}: expected the directory of an adapter; it is a file")
    if not is_repo_id(str(path_or_repo)):
        raise FileFormatError(
            f"{path_or_repo}: no such directory, and not a hub id of the form owner/name"
        )
    start = "" if subfolder is None else f"{subfolder}/"
    files = [start + CONFIG_FILE, start + WEIGHTS_FILE]
    return fetch_files(str(path_or_repo), files, revision, token)


def _write(path: Path, text: str) -> None:
    # a name of the base that is no UTF-8 must not cost the adapter
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
