"""Adapters with something in them, for the tests of their files."""

from __future__ import annotations

import copy

import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig


def shake(model: nn.Module) -> None:
    """Make everything that trains non-zero and new."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def adapted(base: nn.Module, adapter: str = "default", **options) -> nn.Module:
    model = lowrank.inject(copy.deepcopy(base), LoRAConfig(**options), adapter=adapter)
    shake(model)
    return model
