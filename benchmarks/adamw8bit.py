"""A step of AdamW over one float32 parameter: 8-bit moments beside torch's fused float32 ones.

The gradient is the same at every step, so that AdamW's own answer is known at any of them: m and v,
corrected for their bias, are g and g², and t steps move p by -lr t g / (|g| + eps). The error is
that of the way moved, and what 8 bits cost is most of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Contender, copies_for, relative_error
from benchmarks.settings import Settings

LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
LIMIT = 0.1
BYTES_8BIT = 4 + 4 + 4 + 2 * 2 + 4 * 4 / 256  # a parameter: p, g, p again, codes and scales twice
OPERATIONS = 16  # a parameter: 3 for m, 4 for v, 9 for the root, the quotient, decay and the step
BYTES_FP32 = 4 + 4 + 4 + 2 * 8


def run(settings: Settings) -> list[dict]:
    """One case a shape."""
    rows = []
    for label, out_features, in_features in settings.shapes:
        start = torch.randn(out_features, in_features, device=settings.device) * 0.02
        grad = torch.randn_like(start) * 1e-3
        count = copies_for(int(start.numel() * BYTES_8BIT), settings.working_set)
        sides = [_lowrank(start, grad, count)]
        if "torch" in settings.against:
            sides.append(_torch(start, grad, count))
        if "bitsandbytes" in settings.against:
            sides.append(_bitsandbytes(start, grad, count))
        if "torchao" in settings.against:
            sides.append(_torchao(start, grad, count))
        rows += settings.compare("adamw8bit", f"{label} fp32", sides, "torch fused fp32", "copy")
    return rows


def _lowrank(start: Tensor, grad: Tensor, count: int) -> Contender:
    from lowrank import ops

    params, grads = _copies(start, grad, count)
    states = [ops.adamw8bit_state(p) for p in params]
    numbers = {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": 0.0}

    def step(i: int, t: int) -> None:
        state = ([tensor] for tensor in states[i])
        ops.adamw8bit_step([params[i]], [grads[i]], *state, step=t, **numbers)

    lists = ([tensor] for tensor in (start, grad, *states[0]))
    path = peers.chosen_backend("adamw8bit_step", *lists, *numbers.values(), 1)
    return _contender("lowrank", params, grads, start, step, BYTES_8BIT, LIMIT, path)


def _torch(start: Tensor, grad: Tensor, count: int) -> Contender:
    params, grads = _copies(start, grad, count)
    step = _stepping(
        [torch.optim.AdamW([p], LR, BETAS, EPS, weight_decay=0, fused=True) for p in params]
    )
    return _contender("torch fused fp32", params, grads, start, step, BYTES_FP32, None, "")


def _bitsandbytes(start: Tensor, grad: Tensor, count: int) -> Contender:
    params, grads = _copies(start, grad, count)
    made = peers.bitsandbytes().optim.AdamW8bit
    step = _stepping([made([p], LR, BETAS, EPS, weight_decay=0) for p in params])
    return _contender("bitsandbytes", params, grads, start, step, BYTES_8BIT, None, "")


def _torchao(start: Tensor, grad: Tensor, count: int) -> Contender:
    """Compiled by torch.compile at the first step, which is not timed."""
    params, grads = _copies(start, grad, count)
    with peers.quiet():
        from torchao.optim import AdamW8bit

        made = [AdamW8bit([p], LR, BETAS, EPS, weight_decay=0) for p in params]
        step = _stepping(made)
        return _contender("torchao", params, grads, start, step, BYTES_8BIT, None, "")


def _copies(start: Tensor, grad: Tensor, count: int) -> tuple[list[Tensor], list[Tensor]]:
    params = [torch.nn.Parameter(start.clone()) for _ in range(count)]
    grads = [grad.clone() for _ in range(count)]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return params, grads


def _stepping(optimizers: Sequence[torch.optim.Optimizer]) -> Callable[[int, int], None]:
    return lambda i, t: optimizers[i].step()


def _contender(
    name: str,
    params: list[Tensor],
    grads: list[Tensor],
    start: Tensor,
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
        g = grads[i].double()
        return relative_error(
            params[i].detach().double() - start, -LR * taken[i] * g / (g.abs() + EPS)
        )

    for i in range(len(params)):
        call(i)  # some make their state in the first step
    moved = int(start.numel() * bytes_each)
    flops = OPERATIONS * start.numel()
    return Contender(name, call, len(params), error, limit, moved=moved, flops=flops, path=path)
