"""The keys and values of the positions so far."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.models.config import DecoderConfig


class KVCache:
    """Keys and values of the positions so far, preallocated for `capacity` positions.

    Each layer's are [B, capacity, num_key_value_heads, head_dim]; `length` positions are filled.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch_size, capacity, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.capacity = capacity
        self.length = 0

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [B, capacity, heads, D]."""
        return self.keys[layer], self.values[layer]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, S, heads, D] behind the filled part; returns all k, v so far."""
        start, end = self.length, self.length + k.shape[1]
        self.keys[layer][:, start:end] = k
        self.values[layer][:, start:end] = v
        return self.keys[layer][:, :end], self.values[layer][:, :end]
