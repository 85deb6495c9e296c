"""Put another adapter's weights where one already is, so that nothing is compiled again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.adapters import lora
from lowrank.adapters.config import LoRAConfig
from lowrank.errors import FileFormatError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.surgery.targets import adapted_modules, check_adapters

from .adapter import CONFIG_FILE, adapter_directory
from .adapter_config import read_config
from .adapter_tensors import check_fits, read_tensors


@torch.no_grad()
def hotswap_adapter(
    model: nn.Module,
    path_or_repo: str | Path,
    adapter: str = "default",
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
) -> nn.Module:
    """Replace the weights of `adapter` by those of an adapter on disk, within the same tensors.

    Of what a compiled model knows, nothing changes. So the file may have the rank that the adapter
    here was made with or a smaller one, whose rest is zeros; its scale goes into B, beside what
    `scale_adapter` chose here; and layers that it is not on are left with B = 0. To take turns
    among adapters of several ranks and targets, inject one with the largest of both first.

    Returns the model. Raises FileFormatError, with the model as it was, for an adapter of a larger
    rank, on other layers, or of another method.
    """
    check_adapters(model, [adapter])
    directory = adapter_directory(path_or_repo, subfolder, revision, token)
    config, tensors = read_config(directory / CONFIG_FILE), read_tensors(directory)
    layers = {n: m for n, m in adapted_modules(model).items() if adapter in m.config}
    given: dict[str, dict[str, Tensor]] = {}  # the parts of each layer that the file has
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        _check_alike(name, layer, adapter, config, directory)
        shapes = type(layer).file_shapes(layer.unmerged_base, config, name)
        if any(f"{name}.{key}" in tensors for key in shapes):
            expected |= {f"{name}.{key}": shape for key, shape in shapes.items()}
            given[name] = {}
    check_fits(tensors, expected, directory)
    for name in given:
        layer, method = layers[name], layers[name].method(adapter)
        shapes = type(layer).part_shapes(layer.unmerged_base, config, name)
        for part, shape in shapes.items():
            file_key = type(layer).file_key(part, method)
            given[name][part] = tensors[f"{name}.{file_key}"].reshape(shape)
        _check_room(name, layer, adapter, config, given[name], directory)
    for name, layer in layers.items():
        _swap(name, layer, adapter, config, given.get(name))
    return model


def _check_alike(
    name: str, layer: nn.Module, adapter: str, config: LoRAConfig, directory: Path
) -> None:
    if not isinstance(layer, AdaptedLayer) or {"lora_A", "lora_B"} - layer.tensors(adapter).keys():
        raise FileFormatError(
            f"{directory}: hotswap_adapter is for adapters of A and B; {adapter!r} has others on "
            f"{name}: use load_adapter"
        )
    here = layer.config[adapter]
    for field in ("method", "bias", "starts_from_weight", "modules_to_save"):
        mine, its = getattr(here, field), getattr(config, field)
        if mine != its or (field != "method" and mine not in ("none", False, None)):
            raise FileFormatError(
                f"{directory}: expected an adapter of A and B alone, as {adapter!r} is; {field} is "
                f"{its!r} there, {mine!r} here: use load_adapter"
            )


def _check_room(
    name: str,
    layer: AdaptedLayer,
    adapter: str,
    config: LoRAConfig,
    parts: Mapping[str, Tensor],
    directory: Path,
) -> None:
    r, R = config.rank(name), layer.r[adapter]
    places = layer.tensors(adapter)
    alike = all(places[part].shape == tensor.shape for part, tensor in parts.items())
    (N, K), A, B = layer.matrix_shape, places["lora_A"], places["lora_B"]
    plain = (A.shape, B.shape) == ((R, K), (N, R))
    if not alike and (r > R or not plain):
        raise FileFormatError(
            f"{directory}: {name} has rank {r} there, and place for "
            f"{f'at most {R}' if plain else f'{R} alone'} in adapter {adapter!r}; inject one of "
            "that rank first"
        )


def _swap(
    name: str,
    layer: AdaptedLayer,
    adapter: str,
    config: LoRAConfig,
    parts: Mapping[str, Tensor] | None,
) -> None:
    """Write `parts` of a layer, what they leave is zeros; None: the adapter is not on it."""
    places = layer.tensors(adapter)
    if parts is None:
        places["lora_B"].zero_()
        layer.start_magnitude(adapter)
        return
    here = layer.config[adapter]
    s = lora.scaling(config.rank(name), config.alpha(name), config.use_rslora)
    s /= lora.scaling(layer.r[adapter], layer.lora_alpha[adapter], here.use_rslora)
    for part, tensor in parts.items():
        place, wide = places[part], tensor.to(places[part])
        place.zero_()
        place[tuple(slice(size) for size in wide.shape)] = s * wide if part == "lora_B" else wide
