"""Panels: a part of a weight at a time, dense, in a scratch that each thread keeps."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from lowrank.ops import native

# Weights decoded at once, 8 MB of float32: smaller panels are nearer in the caches, but BLAS
# rearranges x anew for each.
PANEL = 1 << 21
# Rows or columns of a bfloat16 panel: of 512 and fewer, oneDNN takes up to twice as long.
_BFLOAT16_WIDTH = 1024

_thread = threading.local()

Weight = tuple[Tensor, Tensor, Tensor | None, Tensor]  # packed, absmax, absmax_scale, codebook


def panels(
    weight: Weight, K: int, block_size: int, dtype: torch.dtype, size: int = PANEL
) -> Iterator[tuple[int, int, Tensor]]:
    """(n0, n1, w [n1 - n0, K]) over all rows: float32 of this size, or bfloat16."""
    height = max(1, size // K) if dtype == torch.float32 else _BFLOAT16_WIDTH
    for n0, n1 in _parts(weight[0].shape[0], height):
        w = scratch(n1 - n0, K, dtype)
        dequantize_rows(weight, K, block_size, n0, n1, w)
        yield n0, n1, w


def bfloat16_columns(weight: Weight, K: int, block_size: int) -> Iterator[tuple[int, int, Tensor]]:
    """(k0, k1, w [N, k1 - k0] bfloat16) over all columns."""
    N = weight[0].shape[0]
    for k0, k1 in _parts(K, _BFLOAT16_WIDTH):
        w = scratch(N, k1 - k0, torch.bfloat16)
        status = native.load_cpu().lowrank_codebook_dequantize_columns(
            *pointers(weight), N, K, block_size, k0, k1,
            w.data_ptr(), native.DTYPES[w.dtype], torch.get_num_threads(),
        )  # fmt: skip
        native.check(status, "codebook_dequantize")
        yield k0, k1, w


def dense_panels(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The same of a dense weight [V, H]: itself where it is float32, else cast panel by panel."""
    V, H = weight.shape
    if weight.dtype == torch.float32:
        yield 0, V, weight
        return
    for v0, v1 in _parts(V, max(1, PANEL // max(1, H))):
        yield v0, v1, scratch(v1 - v0, H).copy_(weight[v0:v1])


def dequantize_rows(weight: Weight, K: int, block_size: int, n0: int, n1: int, out: Tensor) -> None:
    """Rows n0 <= n < n1 of the weight into the contiguous `out` [n1 - n0, K]."""
    status = native.load_cpu().lowrank_codebook_dequantize(
        *pointers(weight), weight[0].shape[0], K, block_size, n0, n1,
        out.data_ptr(), native.DTYPES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "codebook_dequantize")


def scratch(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """This thread's scratch, kept from call to call.

    It is 8 MB in float32 where rows are not very long, 16 MB for the y of a thousand rows; in
    bfloat16, 2 kB for each row or column.
    A forward keeps its outputs, so fresh memory would lie elsewhere in every layer, and be cold.
    """
    size = rows * columns * dtype.itemsize
    buffer = getattr(_thread, "scratch", None)
    if buffer is None or buffer.numel() < size:
        _thread.scratch = None  # freed before the larger one is asked for
        buffer = _thread.scratch = empty(size, dtype=torch.uint8)
    return buffer[:size].view(dtype).view(rows, columns)


def _parts(length: int, most: int) -> Iterator[tuple[int, int]]:
    """(first, last) of as few parts of 0 <= i < length as can be, of nearly equal length.

    A narrow last part would cost BLAS as much as a whole one. They begin at multiples of 32 if
    `most` is one, as `lowrank_codebook_dequantize_columns` asks for.
    """
    count = -(-length // most)
    step = min(most, (-(-length // max(1, count)) + 31) // 32 * 32)
    for first in range(0, length, max(1, step)):
        yield first, min(first + step, length)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of this dtype on the CPU, whatever default dtype and device the caller has set."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def pointers(weight: Weight) -> tuple[int, int, int | None, int, int]:
    """The tensors of a weight and the number of its codebooks, as the C functions take them."""
    packed, absmax, scale, codebook = weight
    scale_ptr = None if scale is None else scale.data_ptr()
    return packed.data_ptr(), absmax.data_ptr(), scale_ptr, codebook.data_ptr(), codebook.shape[0]
