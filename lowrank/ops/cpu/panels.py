"""Panels: some rows of a weight at a time, in a scratch that each thread keeps."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from lowrank.ops import native

PANEL = 1 << 20  # weights decoded at once: 4 MB of float32

_thread = threading.local()

Weight = tuple[Tensor, Tensor, Tensor | None, Tensor]  # packed, absmax, absmax_scale, codebook


def panels(weight: Weight, K: int, block_size: int, size: int) -> Iterator[tuple[int, int, Tensor]]:
    """(n0, n1, w [n1 - n0, K] float32) over all rows, `size` weights at once, in one scratch."""
    N = weight[0].shape[0]
    height = min(N, max(1, size // K))
    room = scratch(height, K)
    for n0 in range(0, N, height):
        n1 = min(n0 + height, N)
        w = room[: n1 - n0]
        dequantize_rows(weight, K, block_size, n0, n1, w)
        yield n0, n1, w


def dense_panels(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The same of a dense weight [V, H]: itself where it is float32, else cast panel by panel."""
    V, H = weight.shape
    if weight.dtype == torch.float32:
        yield 0, V, weight
        return
    height = min(V, max(1, PANEL // max(1, H)))
    room = scratch(height, H)
    for v0 in range(0, V, height):
        v1 = min(v0 + height, V)
        yield v0, v1, room[: v1 - v0].copy_(weight[v0:v1])


def dequantize_rows(weight: Weight, K: int, block_size: int, n0: int, n1: int, out: Tensor) -> None:
    """Rows n0 <= n < n1 of the weight into the contiguous `out` [n1 - n0, K]."""
    status = native.load_cpu().lowrank_codebook_dequantize(
        *pointers(weight), weight[0].shape[0], K, block_size, n0, n1,
        out.data_ptr(), native.DTYPES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "codebook_dequantize")


def scratch(rows: int, columns: int) -> Tensor:
    """This thread's float32 scratch, at most 16 MB but for longer rows, kept from call to call.

    A forward keeps its outputs, so fresh memory would lie elsewhere in every layer, and be cold.
    """
    buffer = getattr(_thread, "scratch", None)
    if buffer is None or buffer.numel() < rows * columns:
        buffer = _thread.scratch = empty(rows * columns)
    return buffer[: rows * columns].view(rows, columns)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of this dtype on the CPU, whatever default dtype and device the caller has set."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def pointers(weight: Weight) -> tuple[int, int, int | None, int, int]:
    """The tensors of a weight and the number of its codebooks, as the C functions take them."""
    packed, absmax, scale, codebook = weight
    scale_ptr = None if scale is None else scale.data_ptr()
    return packed.data_ptr(), absmax.data_ptr(), scale_ptr, codebook.data_ptr(), codebook.shape[0]
