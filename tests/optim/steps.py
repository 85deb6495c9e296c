"""What the tests of optimizers share."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from lowrank.optim import AdamW, AdamW8bit, Lion, Lion8bit

KINDS = [AdamW, AdamW8bit, Lion, Lion8bit]
SHAPES = [(48, 160), (20, 512), (4096,), (4095,), (7,), (), (2, 3, 5, 5), (1, 5001)]


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in SHAPES]


def copied(params: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [p.detach().to(dtype or p.dtype, copy=True).requires_grad_() for p in params]


def gradients(params: list[Tensor], size: float = 1e-2) -> list[Tensor]:
    return [(torch.randn(p.shape) * size).to(p.dtype) for p in params]


def stepped(optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> None:
    """One step by these gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.to(p.dtype)
    optimizer.step()
    optimizer.zero_grad()


def states(optimizer: torch.optim.Optimizer) -> list[dict]:
    """A copy of the states, in the order of the parameters."""
    return copy.deepcopy(list(optimizer.state_dict()["state"].values()))


def same(ours: list[dict], theirs: list[dict]) -> bool:
    """Whether the states are the same to the bit."""
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys()
        and all(torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a)
        for a, b in zip(ours, theirs, strict=True)
    )
