"""In which dtype a forward computes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from lowrank.train.config import TrainConfig


class Precision:
    """bfloat16 under autocast, or the dtypes of the model."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self._dtype = torch.bfloat16 if config.bf16 else None
        self._device = device

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of every forward."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self._dtype)
