"""Fold adapters into the weights, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import is_dataclass, replace

import torch
from torch import nn

from lowrank.errors import ConfigError, TargetError, WeightError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.adapted_module import AdaptedModule
from lowrank.progress import bar

from .inject import replace_modules
from .start import check_may_go
from .targets import adapted_modules, check_adapters
from .tied import tie_merged, tied_modules

Layers = dict[str, AdaptedLayer | AdaptedModule]


def merge(
    model: nn.Module, adapters: Iterable[str] | None = None, dtype: torch.dtype | None = None
) -> None:
    """W <- W + Σ s·B A for the adapters (None: the active ones), in place until `unmerge`.

    Over a quantized base the merged weight is dense, in `dtype` or else the dtype it had before
    quantization: rounding it back to codes would lose most of what was learned. The base layers are
    kept aside meanwhile. Raises WeightError, all as before, if a merged weight is not finite.
    """
    _merge(model, adapted_modules(model), adapters, dtype)


def _merge(
    model: nn.Module,
    layers: Layers,
    adapters: Iterable[str] | None,
    dtype: torch.dtype | None,
) -> list[list[str]]:
    """`merge` of these layers; returns the groups of modules that are tied."""
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigError(
            f"dtype: expected a floating-point dtype for the merged weights; got {dtype}"
        )
    adapters = _check_to_merge(model, layers, adapters, "merge")
    tied = tied_modules(model)
    try:
        for name, layer in bar("merging", layers.items(), len(layers)):
            try:
                layer.merge(adapters, dtype)
            except WeightError as error:
                raise WeightError(f"{name}: {error}") from error
        active = [a for layer in layers.values() for a in layer.active_adapters]
        tie_merged(layers, tied, active if adapters is None else adapters)
    except BaseException:
        unmerge(model)
        raise
    return tied


def unload(model: nn.Module) -> nn.Module:
    """Take every adapter out, merging none; returns the model, its base layers as they were.

    Biases that an adapter trained are part of the base and stay.
    """
    layers = adapted_modules(model)
    for layer in layers.values():
        for adapter, config in layer.config.items():
            check_may_go(adapter, config, "unload")
    replace_modules(model, {layer: layer.unmerged_base for layer in layers.values()})
    return model


def layers_to_merge(
    model: nn.Module, adapters: Iterable[str] | None, what: str
) -> tuple[Layers, list[str] | None]:
    """The layers with adapters, none of them merged, and the adapters as a list."""
    layers = adapted_modules(model)
    return layers, _check_to_merge(model, layers, adapters, what)


def _check_to_merge(
    model: nn.Module, layers: Layers, adapters: Iterable[str] | None, what: str
) -> list[str] | None:
    if not layers:
        raise TargetError(f"{what}: no layer of the model has adapters; inject or load one first")
    if any(layer.merged for layer in layers.values()):
        raise ConfigError(
            f"{what}: expected unmerged layers; the adapters are merged: call unmerge first"
        )
    return None if adapters is None else check_adapters(model, adapters)


def unmerge(model: nn.Module) -> None:
    """Give every layer the base it had before `merge`, bit for bit."""
    for layer in adapted_modules(model).values():
        layer.unmerge()


def merge_and_unload(
    model: nn.Module, adapters: Iterable[str] | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """`merge`, then plain dense linear layers in place of the adapted ones; returns the model.

    A head that was tied to the embedding is so no longer, and the model's config is told.
    """
    layers = adapted_modules(model)
    if not any(layer.merged for layer in layers.values()):
        tied = _merge(model, layers, adapters, dtype)
    elif adapters is not None or dtype is not None:
        raise ConfigError(
            "merge_and_unload: expected neither adapters nor dtype, the adapters are merged "
            "already: call unmerge first"
        )
    else:
        tied = tied_modules(model)
    merged = {layer: layer.base_layer for layer in layers.values()}
    replace_modules(model, merged)
    for layer, new in merged.items():
        if isinstance(layer, AdaptedModule):  # what it trained
            new.requires_grad_(False)
    if tied and tied != tied_modules(model):
        config = getattr(model, "config", None)
        if is_dataclass(config):  # ours, frozen
            model.config = replace(config, tie_word_embeddings=False)
        elif hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = False
    return model
