"""What a training step takes beside the model: activations, gradients, logits; and a prompt."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.models.cache import KVCache
from lowrank.models.generate import pieces
from lowrank.nn.quant_linear import QuantLinear
from lowrank.ops.cpu.codebook import goes_by_panels, panel_dtype
from lowrank.plan.model import are_alike, blocks, trained
from lowrank.plan.trace import (
    GRADIENTS,
    LOGITS,
    WORKSPACE,
    Trace,
    Within,
    mark_first_gradient,
    nbytes,
)

_CPU_LOGITS, _GPU_LOGITS = 1 << 23, 1 << 26  # numbers that linear_cross_entropy holds at once
_CPU_SCRATCH = 8 << 20  # bytes of the panel that weights are decoded to
_FEWEST = 2  # blocks that show what each further one takes


def backward_peaks(
    model: nn.Module,
    layers: int,
    *,
    batch_size: int,
    length: int,
    checkpointing: bool | str,
    accumulates: bool,
    device: str,
) -> list[Counter[str]]:
    """Bytes by kind at the two moments of a forward and backward that may take the most.

    That is: until the gradient reaches the first block, where all activations are alive, and from
    there on, where all gradients are. Both grow by the same with each further block, so that of
    blocks which are alike two and three are run, and the rest is counted. With `accumulates`, the
    gradients of an earlier batch are there.
    """
    some = blocks(model, layers)
    whole = list(some)
    counts = [layers]
    if layers > _FEWEST + 1 and are_alike(some):
        counts = [_FEWEST, _FEWEST + 1]
    found = []
    model.gradient_checkpointing = checkpointing
    try:
        for count in counts:
            del some[count:]
            found.append(_run(model, some[0], batch_size, length, accumulates, device))
            some.extend(whole[count:])
    finally:
        some.extend(whole[len(some) :])
        model.gradient_checkpointing = False
    if len(found) == 1:
        return found[0]
    return [_extended(a, b, layers - _FEWEST) for a, b in zip(*found, strict=True)]


def reading_peak(
    model: nn.Module, layers: int, B: int, S: int, dtype: torch.dtype, device: str
) -> int:
    """Bytes at most beside the model while it reads B prompts of S tokens: their keys and values,
    and what one block takes.
    """
    ids = torch.zeros(B, S, dtype=torch.int64, device="meta")
    cache = KVCache(model.config, B, S, dtype=dtype, device="meta")
    kept = [*cache.keys, *cache.values]
    some = blocks(model, layers)
    whole, training = list(some), model.training
    trace = Trace([ids, *kept, *model.parameters(), *model.buffers()], 0, 0, S, _within(device))
    del some[_FEWEST:]
    try:
        with torch.no_grad(), trace:
            for piece in pieces(ids, model.eval().config):
                model(piece, logits_to_keep=1, cache=cache)
    finally:
        some.extend(whole[len(some) :])
        model.train(training)
    return sum(t.nbytes for t in kept) + sum(trace.peaks([])[0].values())


def _run(
    model: nn.Module, first: nn.Module, B: int, S: int, accumulates: bool, device: str
) -> list[Counter[str]]:
    parameters = trained(model)
    ids = torch.zeros(B, S, dtype=torch.int64, device="meta")
    before = [torch.empty_like(p) for p in parameters] if accumulates else []
    held = [ids, *model.parameters(), *model.buffers(), *before]
    trace = Trace(held, model.config.vocab_size, B * (S - 1), S, _within(device))
    handles = mark_first_gradient(trace, first)
    try:
        for p, gradient in zip(parameters, before, strict=False):
            p.grad = gradient
        with trace:
            model.loss(ids, ids).backward()
        peaks = trace.peaks([p.grad for p in parameters if p.grad is not None])
        for peak in peaks:
            peak[GRADIENTS] += sum(gradient.nbytes for gradient in before)
        return peaks
    finally:
        for handle in handles:
            handle.remove()
        for p in parameters:
            p.grad = None


def _extended(few: Counter[str], one_more: Counter[str], blocks: int) -> Counter[str]:
    """`few`, and for each of so many further blocks what one more took."""
    return Counter({k: few[k] + (one_more[k] - few[k]) * blocks for k in few | one_more})


def _within(device: str) -> Within:
    """What operators of ours take while they run, on that kind of device."""

    def cross_entropy(x: Tensor, weight: Tensor, *_: Any) -> dict[str, int]:
        (T, H), V = x.shape, weight.shape[0]
        rows = max(1, min(T, (_CPU_LOGITS if device == "cpu" else _GPU_LOGITS) // V))
        return {LOGITS: nbytes(rows, V), WORKSPACE: 2 * nbytes(rows, H)}

    ops = torch.ops.lowrank
    table = {ops.linear_cross_entropy.default: cross_entropy}
    if device == "cpu":
        table[ops.lora_linear.default] = _widened
        table[ops.lora_linear_backward.default] = lambda dy, x, h, *rest: _widened(
            dy, *rest[:4], None, *rest[4:], by_panels=True
        )

    def within(func: Any, args: tuple[Any, ...]) -> dict[str, int]:
        return table[func](*args) if func in table else {}

    return within


def _widened(x: Tensor, *args: Any, by_panels: bool = False) -> dict[str, int]:
    """x and y in float32, where a CPU multiplies 16 bits in that, a panel of codes at a time."""
    _, _, _, codebook, _, _, A, B, *_ = args
    N, K = B.shape[1], A.shape[2]
    if codebook is None or panel_dtype(x.dtype) == x.dtype:
        return {}
    if not (by_panels or goes_by_panels(x, N)):
        return {}
    return {WORKSPACE: nbytes(x.numel() // x.shape[-1], N + K)}


def scratch(model: nn.Module, dtype: torch.dtype, device: str) -> int:
    """Bytes of the buffer that quantized weights are decoded to, kept from step to step."""
    shapes = [module.matrix_shape for module in model.modules() if isinstance(module, QuantLinear)]
    if not shapes:
        return 0
    if device == "cpu":
        return _CPU_SCRATCH
    return max(nbytes(*shape, dtype=dtype) for shape in shapes)
