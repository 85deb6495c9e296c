"""What autocast asks of a linear layer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype nn.Linear would compute in: autocast's where it is on, but float64 stays."""
    kind = x.device.type
    if x.dtype == torch.float64 or not is_autocast_on(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast is enabled; never for devices that have none, like meta."""
    known = device_type == "cpu" or torch.amp.is_autocast_available(device_type)  # in Python
    return known and torch.is_autocast_enabled(device_type)


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Within it, tensors on this device keep their dtypes."""
    if is_autocast_on(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
