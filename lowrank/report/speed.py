"""How fast a scheme is beside the dense weight: calls in turn, medians, layer after layer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from lowrank import quant
from lowrank.quant import Quantizer, Storage

MANY = 512  # rows of x in the larger product
_SECONDS, _LEAST, _MOST = 1.0, 5, 50  # of one scheme; how many times each call


@dataclass(frozen=True)
class Speed:
    """Bytes of the dense weight a second, and times of y = x Wᵀ over those of the dense weight."""

    quantize: float
    dequantize: float
    linear_1: float
    linear_many: float


@torch.no_grad()
def measure(
    quantizer: Quantizer,
    weights: Sequence[Tensor],
    storages: Sequence[Storage],
    generator: torch.Generator,
) -> Speed:
    """Medians over weights of one shape [N, K], on their device and in their dtype.

    The six calls come in turn, A B C A B C, so that what slows the machine slows all of them, and
    each on another layer, so that few find their weight in a cache if there are many layers.
    """
    like = weights[0]
    K = like.shape[1]
    one, many = (
        torch.randn(M, K, generator=generator).to(like.device, like.dtype) for M in (1, MANY)
    )
    calls: list[Callable[[int], object]] = [
        lambda i: quantizer.quantize(weights[i]),
        lambda i: quantizer.dequantize(storages[i], like.dtype),
        lambda i: dense_linear(one, weights[i]),
        lambda i: quant.linear(quantizer, one, storages[i]),
        lambda i: dense_linear(many, weights[i]),
        lambda i: quant.linear(quantizer, many, storages[i]),
    ]
    apart = max(1, len(weights) // len(calls))
    times: list[list[float]] = [[] for _ in calls]
    begin, turn = time.perf_counter(), 0
    while turn <= _LEAST or (turn <= _MOST and time.perf_counter() - begin < _SECONDS):
        for place, (call, taken) in enumerate(zip(calls, times, strict=True)):
            taken.append(_seconds(call, (turn + place * apart) % len(weights), like.device))
        turn += 1
    # the first turn warms up
    quantize, dequantize, one_dense, one_quantized, many_dense, many_quantized = (
        statistics.median(taken[1:]) for taken in times
    )
    size = like.numel() * like.element_size()
    return Speed(
        size / quantize, size / dequantize, one_quantized / one_dense, many_quantized / many_dense
    )


def _seconds(call: Callable[[int], object], which: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call(which)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
