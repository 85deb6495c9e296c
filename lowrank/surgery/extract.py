"""An adapter from two models: what one of them has learned beyond the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.adapters import svd
from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, DtypeError, ShapeError, TargetError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.quant_linear import QuantLinear
from lowrank.progress import bar

from .inject import attach, resolve
from .targets import walk


@dataclass(frozen=True)
class ExtractedLayer:
    """How much of one layer's difference D its adapter has: |s·B A|² / |D|², 1 being all."""

    name: str
    size: float  # |D|²
    kept: float


@dataclass(frozen=True)
class ExtractReport:
    """What `extract_adapter` found, layer by layer; printed, the whole and the worst."""

    layers: tuple[ExtractedLayer, ...]
    left_out: tuple[str, ...]  # tensors that differ and that no adapter was made for

    @property
    def kept(self) -> float:
        """The share of the energy, of all layers' differences together."""
        total = sum(layer.size for layer in self.layers)
        return sum(layer.size * layer.kept for layer in self.layers) / total if total else 1.0

    def __str__(self) -> str:
        worst = min(self.layers, key=lambda layer: layer.kept)
        lines = [
            f"energy kept, |s·B A|² / |D|², over {len(self.layers)} layers: {self.kept:.2%}; "
            f"worst {worst.kept:.2%} in {worst.name}"
        ]
        if self.left_out:
            some, more = ", ".join(self.left_out[:3]), len(self.left_out) - 3
            rest = f" and {more} more" if more > 0 else ""
            lines.append(f"left out, for they differ but are no targets: {some}{rest}")
        return "\n".join(lines)


@torch.no_grad()
def extract_adapter(
    model: nn.Module, weights: Mapping[str, Tensor], config: LoRAConfig, adapter: str = "default"
) -> ExtractReport:
    """Give `model` the adapter with which it is nearest to a tuned one, that has `weights`.

    Of the difference D of each linear layer that `config` targets, s·B A is the nearest matrix of
    rank R: the first R parts of its SVD. `weights` are the tuned model's by their names, one taken
    at a time: its state dict, or what `open_weights` reads. The model may be quantized; D then has
    what quantizing lost as well.

    Returns the energy kept. Raises ConfigError, ShapeError or WeightError for what is missing, does
    not fit or is not finite, TargetError for targets that are not linear; the model is then as it
    was.
    """
    if not isinstance(weights, Mapping):
        raise ConfigError(
            "weights: expected tensors by their names, as model.state_dict() has them; got "
            f"{type(weights).__name__}"
        )
    if not isinstance(config, LoRAConfig):
        raise ConfigError(f"config: expected a LoRAConfig; got {type(config).__name__}")
    if config.starts_from_weight or config.method != "lora":
        raise ConfigError(
            "config: expected method 'lora' with a start of its own, which is replaced; got "
            f"{config.method!r}, init_lora_weights={config.init_lora_weights!r}"
        )
    if config.target_rows:
        raise ConfigError(
            f"target_rows: expected none, whole weights differ; got {config.target_rows}"
        )
    names, config = resolve(model, config)
    modules = dict(walk(model))
    for name in names:
        if not isinstance(modules[name], nn.Linear | QuantLinear):
            raise TargetError(
                f"{name}: expected a linear layer without adapters; got "
                f"{type(modules[name]).__name__}"
            )
        _check(f"{name}.weight", weights, _plain_shape(modules[name]))
    rows, shown = [], iter(bar("extracting", names, len(names)))

    def fill(name: str, layer: AdaptedLayer) -> None:
        next(shown)
        base, s = layer.base_layer, layer.scaling[adapter]
        before = layer.matrix(torch.float32)
        tuned = weights[f"{name}.weight"].detach().to(before)
        if isinstance(base, QuantLinear):
            tuned = base.matrix(tuned)
        difference = svd.checked(tuned - before, layer.r[adapter], 1, s)
        floor = torch.finfo(torch.float32).eps * before.norm().item()
        A, B = svd.factors(difference, layer.r[adapter], s, floor)
        for parameter, factor in zip(layer.factors(adapter), (A, B), strict=True):
            parameter.copy_(factor)
        size = difference.square().sum().item()
        rest = (difference - s * B @ A).square().sum().item()
        rows.append(ExtractedLayer(name, size, 1 - rest / size if size else 1.0))

    targets = {f"{name}.weight" for name in names}
    own = {k: p for k, p in model.named_parameters() if k not in targets and k in weights}
    left_out = tuple(k for k, p in own.items() if _differs(p, weights[k]))
    attach(model, names, config, adapter, fill)
    return ExtractReport(tuple(rows), left_out)


def _plain_shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(module.plain_shape if isinstance(module, QuantLinear) else module.weight.shape)


def _check(key: str, weights: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    if key not in weights:
        raise ConfigError(f"weights: expected {key} among them; it is missing")
    weight = weights[key]
    if not weight.is_floating_point():
        raise DtypeError(f"{key}: expected the tuned weight in floats; got {weight.dtype}")
    if tuple(weight.shape) != shape:
        raise ShapeError(f"{key}: expected {list(shape)}; got {list(weight.shape)}")


def _differs(mine: Tensor, other: Tensor) -> bool:
    return mine.is_floating_point() and not (
        mine.shape == other.shape and torch.equal(mine, other.to(mine))
    )
