"""Training a model with adapters, and merging what it learned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import lowrank


def train(model: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float) -> list[float]:
    """The loss before each step of AdamW on what is trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def assert_merges_and_back(model: nn.Module, x: Tensor) -> None:
    """Merging changes the answer by rounding alone, and unmerging gives it back to the bit."""
    y = model(x)
    lowrank.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    lowrank.unmerge(model)
    assert torch.equal(model(x), y)
