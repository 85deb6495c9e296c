"""What this machine can do at most, measured in the same run: memory and matmul."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

SIZE = 1536  # of the matmul: 7 GFLOP, long enough for every core
STREAM_BYTES = 512 << 20  # of the streams, if memory allows: past any cache


def ceilings(
    working_set: int, dtypes: Sequence[torch.dtype] = (torch.float32,), repeats: int = 7
) -> dict[str, float]:
    """Best rates of a few repeats.

    `copy_gbs`: torch's copy of a float32 tensor, bytes read plus bytes written; `read_gbs`: the
    better of a sum and a matrix-vector product over float32; `matmul_tflops`: a square float32
    matmul of random numbers (zeros would run at a higher clock), and `matmul_<dtype>_tflops` that
    of the other dtypes asked for. GB and TFLOP are powers of ten.
    """
    count = max(1 << 16, min(STREAM_BYTES, working_set) // 4 // 4096 * 4096)
    copy, read = _streams(count, repeats)
    limits = {"copy_gbs": 8 * count / copy * 1e-9, "read_gbs": 4 * count / read * 1e-9}
    for dtype in dict.fromkeys((torch.float32, *dtypes)):
        left, right = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
        limits[matmul_key(dtype)] = 2 * SIZE**3 / _best_matmul(left, right, repeats) * 1e-12
    return limits


def matmul_key(dtype: torch.dtype | str) -> str:
    """The name of a dtype's matmul rate among the ceilings; float32's is there in every run."""
    name = str(dtype).removeprefix("torch.")
    return "matmul_tflops" if name == "float32" else f"matmul_{name}_tflops"


def matmul_tflops(limits: dict[str, float], dtype: str) -> float:
    """The highest rate at which a result in `dtype` could be computed: in it, or in float32."""
    return max(limits["matmul_tflops"], limits.get(matmul_key(dtype), 0.0))


def better(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """The higher of two measurements of each ceiling."""
    return {name: max(first[name], second[name]) for name in first}


def floor_seconds(
    limits: dict[str, float], moved: int, flops: int, memory: str, dtype: str = "float32"
) -> float:
    """The least time for `moved` bytes and `flops` operations; `memory` is "copy" or "read"."""
    rate = matmul_tflops(limits, dtype) * 1e12
    return max(moved / (limits[f"{memory}_gbs"] * 1e9), flops / rate)


def _streams(count: int, repeats: int) -> tuple[float, float]:
    source, target = torch.rand(count), torch.zeros(count)
    matrix, vector = source.view(-1, 4096), torch.rand(4096)
    read = min(_best(lambda: source.sum(), repeats), _best(lambda: matrix @ vector, repeats))
    return _best(lambda: target.copy_(source), repeats), read


def _best_matmul(left: torch.Tensor, right: torch.Tensor, repeats: int) -> float:
    """Seconds; a dtype that has no fast matmul here takes seconds a call, and is called once."""
    out = torch.empty_like(left)
    start = time.perf_counter()
    torch.mm(left, right, out=out)
    first = time.perf_counter() - start
    return first if first > 1 else _best(lambda: torch.mm(left, right, out=out), repeats)


def _best(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
