"""In which dtype a forward computes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lowrank.errors import ConfigError
from lowrank.train.config import TrainConfig


class Precision:
    """bfloat16 or float16 under autocast, or the dtypes of the model; without a config, these."""

    def __init__(self, config: TrainConfig | None, device: torch.device) -> None:
        halves = {config.bf16: torch.bfloat16, config.fp16: torch.float16} if config else {}
        self._dtype = halves.get(True)
        self._device = device

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of every forward."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._dtype)


def check_master_weights(parameters: Mapping[str, nn.Parameter]) -> None:
    """ConfigError if a parameter to be trained under fp16 is not in float32.

    float16 has no room for the scaled gradient, nor for the small steps of an optimizer.
    """
    for name, p in parameters.items():
        if p.dtype != torch.float32:
            raise ConfigError(
                f"fp16 trains parameters of float32; {name} is {str(p.dtype).split('.')[1]}: "
                "convert what is trained, as p.data = p.data.float(), and leave the rest"
            )
