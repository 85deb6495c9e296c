"""An adapter that has a part of the weights, turned into plain LoRA beside all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, DtypeError, ShapeError, WeightError
from lowrank.nn.lora_linear import LoRALinear
from lowrank.nn.quant_linear import QuantLinear, is_conv1d
from lowrank.quant import Storage

from .targets import adapted_layers, check_adapters

_NEAR = 0.02  # of |W|: a base made again is the same but for rounding, and a few codes


@torch.no_grad()
def convert_to_lora(
    model: nn.Module, weights: Mapping[str, Tensor], adapter: str = "default"
) -> nn.Module:
    """Give a PiSSA or OLoRA adapter's part of the weights back to the base, in place.

        W_rest + s·B A = W + s·(B A - B₀ A₀) = W + s·[B, -B₀] [A; A₀]

    A₀ and B₀ are what the adapter started with, made again from `weights`, the original ones by
    their names in the model's unquantized state dict. The rank doubles, s stays. Then it is LoRA
    like any other: others fit beside it, it may be deleted, and its file loads over the plain
    model. A quantized base is quantized anew from the whole weight, which is not the rest as it was
    quantized: the model's output changes by about what quantizing loses.

    Returns the model. Raises ConfigError, WeightError, ShapeError with the model as it was.
    """
    check_adapters(model, [adapter])
    layers = {n: layer for n, layer in adapted_layers(model).items() if adapter in layer.config}
    config = next(iter(layers.values())).config[adapter]
    if not config.starts_as_principal_part:
        raise ConfigError(
            f"convert_to_lora: expected an adapter with a part of the weights (pissa, olora); "
            f"{adapter!r} has init_lora_weights={config.init_lora_weights!r}"
        )
    doubled = _doubled(config)
    starts = {name: _start(name, layer, adapter, weights) for name, layer in layers.items()}
    for name, layer in layers.items():
        before, active, (A0, B0) = layer.tensors(adapter), layer.active_adapters, starts[name]
        layer.replace_base(_whole(layer, weights[f"{name}.weight"]))
        layer.delete_adapter(adapter)
        layer.add_adapter(adapter, doubled, name)
        more = {"lora_A": torch.cat([before["lora_A"], A0.to(before["lora_A"])])}
        more["lora_B"] = torch.cat([before["lora_B"], -B0.to(before["lora_B"])], dim=1)
        for part, tensor in layer.tensors(adapter).items():
            tensor.copy_(more.get(part, before[part]))
        layer.set_adapter(active)
    return model


def _doubled(config: LoRAConfig) -> LoRAConfig:
    factor = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config.with_fresh_start(),
        r=2 * config.r,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        lora_alpha=factor * config.lora_alpha,
        alpha_pattern={key: factor * alpha for key, alpha in config.alpha_pattern.items()},
    )


def _start(
    name: str, layer: LoRALinear, adapter: str, weights: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """(A₀, B₀) of a layer, if its base is what they leave of the original weight."""
    key = f"{name}.weight"
    if key not in weights:
        raise ConfigError(f"weights: expected {key} among them; it is missing")
    base = layer.matrix(torch.float32)
    try:
        rest, A0, B0 = layer.split(adapter, layer.config[adapter], weights[key].to(base.device))
    except (ShapeError, WeightError, DtypeError) as error:
        raise type(error)(f"{name}.{error}") from error
    if isinstance(layer.base_layer, QuantLinear):
        rest = layer.base_layer.quantizer.dequantize(rest, torch.float32)
    if (rest - base).norm() > _NEAR * base.norm():
        raise WeightError(
            f"{key}: expected the weight that adapter {adapter!r} started from; what it leaves of "
            "this one is not the base; pass the weights of the same model"
        )
    return A0, B0


def _whole(layer: LoRALinear, weight: Tensor) -> Storage | Tensor:
    """What `replace_base` takes for the original weight."""
    base = layer.base_layer
    if isinstance(base, QuantLinear):
        device = next(base.parameters()).device
        return base.quantizer.quantize(base.matrix(weight.to(device)))
    whole = (weight.T if is_conv1d(base) else weight).to(base.weight, copy=True)
    return whole.contiguous()
