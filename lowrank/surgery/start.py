"""What an adapter that starts from the weights needs, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, DtypeError, ShapeError, WeightError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.quant_embedding import QuantEmbedding
from lowrank.nn.quant_linear import QuantLinear, is_dense_linear
from lowrank.quant import Quantizer

from .targets import is_linear, walk


def check_start(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    config: LoRAConfig,
    quantizer: str | Quantizer | None,
    weights: Mapping[str, Tensor] | None,
) -> None:
    """Raises if `inject` cannot quantize these targets, or start adapters from their weights.

    Every original is read once for that, which is little beside decomposing it.
    """
    how = f"init_lora_weights={config.init_lora_weights!r}"
    if weights is not None and not config.starts_from_weight:
        raise ConfigError(f"weights: expected None, {how} does not start from them; got a mapping")
    tables = {
        id(parameter): table
        for table, module in walk(model)
        if isinstance(module, nn.Embedding | QuantEmbedding)
        for parameter in module.parameters()
    }
    for name, module in targets.items():
        changes = config.starts_from_weight or quantizer is not None and is_dense_linear(module)
        own = module.parameters() if changes and not isinstance(module, AdaptedLayer) else ()
        tied = next((tables[id(p)] for p in own if id(p) in tables), None)
        if tied is not None:
            raise ConfigError(
                f"{name}.weight: is also {tied}.weight, which an adapter here must not change; "
                f"add {name!r} to exclude_modules"
            )
        if isinstance(module, AdaptedLayer):
            if config.starts_from_weight:
                raise ConfigError(
                    f"{how}: expected targets without adapters, as it changes the base; "
                    f"{name} has {', '.join(module.config)}"
                )
            if quantizer is not None and is_dense_linear(module.unmerged_base):
                raise ConfigError(
                    f"quantizer: expected targets without adapters; {name} has some over a dense "
                    "weight: call lowrank.quantize first"
                )
        elif config.starts_from_weight and not is_linear(module):
            raise ConfigError(
                f"{how}: expected linear layers; {name} is {type(module).__name__}; add it to "
                "exclude_modules"
            )
        elif is_dense_linear(module):
            if quantizer is None and config.init_lora_weights == "loftq":
                raise ConfigError(
                    f"{how}: expected a quantizer for {name}; got None; pass quantizer='nf4'"
                )
        elif config.starts_from_weight:
            if weights is None:
                raise ConfigError(
                    f"{how}: expected the original weight of {name}, which is quantized already; "
                    "pass weights=lowrank.open_weights(path), or inject with quantizer= into the "
                    "unquantized model"
                )
            _check_original(f"{name}.weight", module, weights)


def check_alone(configs: Mapping[str, LoRAConfig]) -> None:
    """Raises if one of several adapters has the principal part that the base of all lacks."""
    for adapter, config in configs.items():
        if config.starts_as_principal_part and len(configs) > 1:
            raise ConfigError(
                f"adapter {adapter!r}: has the principal part of the weights (init_lora_weights="
                f"{config.init_lora_weights!r}), so no other fits the base; expected it alone, got "
                f"{', '.join(map(repr, configs))}; merge_and_unload gives the weights back"
            )


def _check_original(key: str, layer: QuantLinear, weights: Mapping[str, Tensor]) -> None:
    try:
        weight = weights[key]
    except KeyError as error:
        raise ConfigError(
            f"weights: expected {key} among them; it is missing; they are those of the model "
            "before it was quantized: load that, with quantizer="
        ) from error
    if not weight.is_floating_point():
        raise DtypeError(f"{key}: expected the unquantized weight, in floats; got {weight.dtype}")
    if weight.shape != layer.plain_shape:
        raise ShapeError(f"{key}: expected {list(layer.plain_shape)}; got {list(weight.shape)}")
    base = layer.dequantize(torch.float32)
    weight = layer.matrix(weight.to(base))
    if not bool(weight.isfinite().all()):
        raise WeightError(f"{key}: expected finite values; got NaN or inf")
    if (base - weight).norm() > weight.norm():
        raise WeightError(
            f"{key}: expected the weight that the layer was quantized from; got one that is "
            "farther from it than zero is; pass the weights of the same model"
        )


def check_may_go(adapter: str, config: LoRAConfig, what: str) -> None:
    """Raises ConfigError if the adapter has the principal part of the weights, to be lost by it."""
    if config.starts_as_principal_part:
        raise ConfigError(
            f"{what}: {adapter!r} has the principal part of the weights "
            f"(init_lora_weights={config.init_lora_weights!r}); merge_and_unload gives it back to "
            "them"
        )
