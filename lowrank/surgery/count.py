"""How much of a model trains."""

from __future__ import annotations

import math

from torch import nn

from lowrank.nn.quant_weight import QuantWeight


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, adapters included; a quantized weight counts as N·K."""
    seen: set[int] = set()
    trainable = total = 0
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        if isinstance(module, QuantWeight):
            storage = {id(p) for p in parameters if not p.is_floating_point()}
            parameters = [p for p in parameters if p.is_floating_point()]  # the bias
            total += 0 if storage <= seen else math.prod(module.shape)
            seen |= storage
        for parameter in parameters:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total += parameter.numel()
                trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


def print_trainable_parameters(model: nn.Module) -> None:
    """Print PEFT's line: trainable params: 1,344 || all params: 12,984 || trainable%: 10.3512"""
    trainable, total = count_parameters(model)
    percent = 100 * trainable / max(1, total)
    print(
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}"
    )
