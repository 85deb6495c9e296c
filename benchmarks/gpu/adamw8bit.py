"""A step of AdamW over float32 parameters, one dense weight or the LoRA of a whole model, beside
torch's fused one with float32 moments, and bitsandbytes.

As on a CPU, the gradient is the same at every step, so that AdamW's own answer is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.adamw8bit import BETAS, BYTES_8BIT, BYTES_FP32, EPS, LIMIT, LR, OPERATIONS
from benchmarks.gpu.session import Session
from benchmarks.harness import Contender, relative_error

RANK, LINEARS = 16, 224  # seven of each of 32 blocks: 448 tensors


def run(session: Session) -> None:
    """Two cases a shape: a weight, and A and B of as many such weights as a model has."""
    for label, N, K in session.shapes:
        lora = [(RANK, K), (N, RANK)] * (LINEARS if session.device.type == "cuda" else 2)
        for name, sizes in ((label, [(N, K)]), (f"LoRA of {len(lora) // 2} {label}", lora)):
            start = [torch.randn(size, device=session.device) * 0.02 for size in sizes]
            sides = _contenders(session, start)
            session.compare("adamw8bit", f"{name} fp32", sides, "copy", torch.float32)


def _contenders(session: Session, start: list[Tensor]) -> list[Contender]:
    grads = [torch.randn_like(p) * 1e-3 for p in start]
    count = session.copies(int(sum(p.numel() for p in start) * BYTES_8BIT))
    sides = [
        _optimizer("torch fused fp32", start, grads, count, BYTES_FP32, _fused),
        _lowrank(start, grads, count),
    ]
    if session.device.type == "cuda" and "bitsandbytes" in session.against:
        made = peers.bitsandbytes().optim.AdamW8bit
        sides.append(_optimizer("bitsandbytes", start, grads, count, BYTES_8BIT, made))
    return sides


def _fused(params: list[Tensor], *args, **kwargs) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, *args, fused=True, **kwargs)


def _lowrank(start: list[Tensor], grads: list[Tensor], count: int) -> Contender:
    from lowrank import ops

    params = [[p.clone() for p in start] for _ in range(count)]
    states = [zip(*map(ops.adamw8bit_state, copy), strict=True) for copy in params]
    lists = [[list(tensors) for tensors in state] for state in states]
    numbers = {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": 0.0}

    def step(i: int, t: int) -> None:
        ops.adamw8bit_step(params[i], grads, *lists[i], step=t, **numbers)

    path = peers.chosen_backend("adamw8bit_step", start, grads, *lists[0], *numbers.values(), 1)
    return _contender("lowrank", params, grads, start, step, BYTES_8BIT, LIMIT, path)


def _optimizer(
    name: str,
    start: list[Tensor],
    grads: list[Tensor],
    count: int,
    bytes_each: float,
    make: Callable[..., torch.optim.Optimizer],
) -> Contender:
    params = [[torch.nn.Parameter(p.clone()) for p in start] for _ in range(count)]
    for copy in params:
        for p, grad in zip(copy, grads, strict=True):
            p.grad = grad
    optimizers = [make(copy, LR, BETAS, EPS, weight_decay=0.0) for copy in params]
    return _contender(
        name, params, grads, start, lambda i, t: optimizers[i].step(), bytes_each, None, ""
    )


def _contender(
    name: str,
    params: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor],
    start: Sequence[Tensor],
    step: Callable[[int, int], None],
    bytes_each: float,
    limit: float | None,
    path: str,
) -> Contender:
    taken = [0] * len(params)

    def call(i: int) -> int:
        taken[i] += 1
        step(i, taken[i])
        return i

    def error(i: int) -> float:
        ways = [(p.detach() - q).flatten() for p, q in zip(params[i], start, strict=True)]
        g = torch.cat([grad.flatten() for grad in grads]).double()
        return relative_error(torch.cat(ways), -LR * taken[i] * g / (g.abs() + EPS))

    for i in range(len(params)):
        call(i)  # some make their state in the first step
    elements = sum(p.numel() for p in start)
    moved, flops = int(elements * bytes_each), OPERATIONS * elements
    return Contender(name, call, len(params), error, limit, moved, flops, path=path)
