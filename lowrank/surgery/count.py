"""How much of a model trains."""

from __future__ import annotations

import math

from torch import nn

from lowrank.nn.quant_weight import QuantWeight, quant_weights

from .targets import check_model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, adapters included; a quantized weight counts as N·K."""
    check_model(model)
    codes = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, QuantWeight)
        for parameter in module.parameters(recurse=False)
        if not parameter.is_floating_point()  # its bias is a plain parameter
    }
    plain = [parameter for parameter in model.parameters() if id(parameter) not in codes]
    trainable = sum(parameter.numel() for parameter in plain if parameter.requires_grad)
    quantized = sum(math.prod(weight.shape) for weight in quant_weights(model).values())
    return trainable, quantized + sum(parameter.numel() for parameter in plain)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print PEFT's line: trainable params: 1,344 || all params: 12,984 || trainable%: 10.3512"""
    trainable, total = count_parameters(model)
    percent = 100 * trainable / max(1, total)
    print(
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}"
    )
