"""What this machine can do at most, measured in the same run: memory and matmul."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SIZE = 1536  # of the matmul: 7 GFLOP, long enough for every core
STREAM_BYTES = 512 << 20  # of the streams, if memory allows: past any cache


def ceilings(working_set: int, repeats: int = 7) -> dict[str, float]:
    """Best rates of a few repeats.

    `copy_gbs`: torch's copy of a float32 tensor, bytes read plus bytes written; `read_gbs`: the
    better of a sum and a matrix-vector product over float32; `matmul_tflops`: a square float32
    matmul of random numbers (zeros would run at a higher clock). GB and TFLOP are powers of ten.
    """
    count = max(1 << 16, min(STREAM_BYTES, working_set) // 4 // 4096 * 4096)
    copy, read = _streams(count, repeats)
    left, right = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    out = torch.empty(SIZE, SIZE)
    matmul = _best(lambda: torch.mm(left, right, out=out), repeats)
    return {
        "copy_gbs": 8 * count / copy * 1e-9,
        "read_gbs": 4 * count / read * 1e-9,
        "matmul_tflops": 2 * SIZE**3 / matmul * 1e-12,
    }


def better(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """The higher of two measurements of each ceiling."""
    return {name: max(first[name], second[name]) for name in first}


def floor_seconds(limits: dict[str, float], moved: int, flops: int, memory: str) -> float:
    """The least time for `moved` bytes and `flops` operations; `memory` is "copy" or "read"."""
    return max(moved / (limits[f"{memory}_gbs"] * 1e9), flops / (limits["matmul_tflops"] * 1e12))


def _streams(count: int, repeats: int) -> tuple[float, float]:
    source, target = torch.rand(count), torch.zeros(count)
    matrix, vector = source.view(-1, 4096), torch.rand(4096)
    read = min(_best(lambda: source.sum(), repeats), _best(lambda: matrix @ vector, repeats))
    return _best(lambda: target.copy_(source), repeats), read


def _best(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
