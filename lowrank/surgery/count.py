"""How much of a model trains."""

from __future__ import annotations

from torch import nn

from lowrank.nn.quant_linear import QuantLinear


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, adapters included; a quantized weight counts as N·K."""
    seen: set[int] = set()
    trainable = total = 0
    for module in model.modules():
        if isinstance(module, QuantLinear):
            total += module.out_features * module.in_features
            parameters = [] if module.bias is None else [module.bias]
        else:
            parameters = module.parameters(recurse=False)
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
