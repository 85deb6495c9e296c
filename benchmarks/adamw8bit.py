"""A step of AdamW over float32 parameters: 8-bit moments beside torch's fused float32 ones.

One case is a weight, the other the adapters of a model's linears: A and B of each, 448 tensors. The
gradient is the same at every step, so that AdamW's own answer is known at any of them: m and v,
corrected for their bias, are g and g², and t steps move p by -lr t g / (|g| + eps). The error is
that of the way moved, and what 8 bits cost is most of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks import peers
from benchmarks.harness import Contender, copies_for, relative_error
from benchmarks.settings import Settings

LR, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
LIMIT = 0.1
BYTES_8BIT = 4 + 4 + 4 + 2 * 2 + 4 * 4 / 256  # a parameter: p, g, p again, codes and scales twice
OPERATIONS = 16  # a parameter: 3 for m, 4 for v, 9 for the root, the quotient, decay and the step
BYTES_FP32 = 4 + 4 + 4 + 2 * 8
RANK, LINEARS = 16, 224  # seven in each of 32 blocks

Parameters = list[list[Tensor]]  # copies of the tensors of a case


def run(settings: Settings) -> list[dict]:
    """Two cases a shape."""
    rows = []
    for label, N, K in settings.shapes:
        adapters = [(RANK, K), (N, RANK)] * LINEARS
        for case, sizes in ((label, [(N, K)]), (f"LoRA r={RANK} of {LINEARS} {label}", adapters)):
            start = [torch.randn(size, device=settings.device) * 0.02 for size in sizes]
            sides = _contenders(settings, start)
            rows += settings.compare("adamw8bit", f"{case} fp32", sides, "torch fused fp32", "copy")
    return rows


def _contenders(settings: Settings, start: list[Tensor]) -> list[Contender]:
    grads = [torch.randn_like(p) * 1e-3 for p in start]
    count = copies_for(int(sum(p.numel() for p in start) * BYTES_8BIT), settings.working_set)
    sides = [_lowrank(start, grads, count)]
    for name, make, bytes_each in (
        ("torch fused fp32", _fused, BYTES_FP32),
        ("bitsandbytes", _bitsandbytes, BYTES_8BIT),
        ("torchao", _torchao, BYTES_8BIT),
    ):
        if name.split()[0] in settings.against:
            sides.append(_optimizers(name, make, bytes_each, start, grads, count))
    return sides


def _lowrank(start: list[Tensor], grads: list[Tensor], count: int) -> Contender:
    from lowrank import ops

    params, copied = _copies(start, grads, count)
    states = [
        [list(tensors) for tensors in zip(*map(ops.adamw8bit_state, copy), strict=True)]
        for copy in params
    ]
    numbers = {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": 0.0}

    def step(i: int, t: int) -> None:
        ops.adamw8bit_step(params[i], copied[i], *states[i], step=t, **numbers)

    made = _contender("lowrank", params, grads, start, step, BYTES_8BIT)
    made.limit = LIMIT
    lists = (start, grads, *states[0])
    made.path = peers.chosen_backend("adamw8bit_step", *lists, *numbers.values(), 1)
    return made


def _optimizers(
    name: str,
    make: Callable[..., Optimizer],
    bytes_each: float,
    start: list[Tensor],
    grads: list[Tensor],
    count: int,
) -> Contender:
    """An optimizer for each copy; what one compiles at its first step is not timed."""
    params, _ = _copies(start, grads, count)
    with peers.quiet():
        optimizers = [make(copy, LR, BETAS, EPS, weight_decay=0.0) for copy in params]
        return _contender(name, params, grads, start, lambda i, t: optimizers[i].step(), bytes_each)


def _fused(params: list[Tensor], *args, **options) -> Optimizer:
    return torch.optim.AdamW(params, *args, fused=True, **options)


def _bitsandbytes(params: list[Tensor], *args, **options) -> Optimizer:
    return peers.bitsandbytes().optim.AdamW8bit(params, *args, **options)


def _torchao(params: list[Tensor], *args, **options) -> Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, *args, **options)


def _copies(start: list[Tensor], grads: list[Tensor], count: int) -> tuple[Parameters, Parameters]:
    """Parameters and gradients, each copy with memory of its own."""
    params = [[torch.nn.Parameter(p.clone()) for p in start] for _ in range(count)]
    copied = [[g.clone() for g in grads] for _ in range(count)]
    for tensors, gradients in zip(params, copied, strict=True):
        for p, g in zip(tensors, gradients, strict=True):
            p.grad = g
    return params, copied


def _contender(
    name: str,
    params: Parameters,
    grads: list[Tensor],
    start: list[Tensor],
    step: Callable[[int, int], None],
    bytes_each: float,
) -> Contender:
    taken = [0] * len(params)

    def call(i: int) -> int:
        taken[i] += 1
        step(i, taken[i])
        return i

    def error(i: int) -> float:
        ways = [(p.detach().double() - q).flatten() for p, q in zip(params[i], start, strict=True)]
        g = torch.cat([grad.flatten() for grad in grads]).double()
        return relative_error(torch.cat(ways), -LR * taken[i] * g / (g.abs() + EPS))

    for i in range(len(params)):
        call(i)  # some make their state in the first step
    elements = sum(p.numel() for p in start)
    moved, flops = int(elements * bytes_each), OPERATIONS * elements
    return Contender(name, call, len(params), error, moved=moved, flops=flops)
