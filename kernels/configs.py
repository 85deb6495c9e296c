"""The tile of every kernel as a function of the shapes: launched, tested and compiled from here.

Fixed, not tuned at run time: another tile adds in another order, and the bits of a result would
depend on what a tuner had found. What is here was chosen by arithmetic and by registers; none of it
has been measured on a GPU yet.
"""

from __future__ import annotations

import triton

# A fused multiply-add would round absmax = code * step + offset once; the format says twice.
ROUNDED = {"enable_fp_fusion": False}


def dequantize(K: int, G: int) -> dict:
    """codebook_dequantize_kernel: 8 elements for each of 128 threads, 16-byte stores of a row."""
    return _spans(K, G, 1024) | {"num_warps": 4} | ROUNDED


def quantize(K: int, G: int) -> dict:
    """codebook_quantize_kernel: whole blocks, about 1024 elements."""
    spans = max(1, _tile(K, 1024) // G)
    return {"G": G, "SPANS": spans, "num_warps": 4 if spans * G <= 1024 else 8} | ROUNDED


def linear_row(K: int, G: int) -> dict:
    """codebook_linear_row_kernel: 8 rows of W, 16 bytes of codes for each of 128 threads."""
    return _spans(K, G, 512) | {"BLOCK_N": 8, "STAGES": 3, "num_warps": 4} | ROUNDED


def linear(M: int, K: int, G: int, float32: bool) -> dict:
    """codebook_linear_kernel: up to 32 rows of x, K is split over the warps; above, N is.

    Rows of x that are not aligned are loaded an element at a time, each with an address. In float32
    there are no tensor cores, and a thread holds all it multiplies: shorter spans.
    """
    if M <= 32:
        tile = {"SPLITS": 4, "BLOCK_M": tile_rows(M), "BLOCK_N": 32}
    else:
        tile = {"SPLITS": 1, "BLOCK_M": 64, "BLOCK_N": 64}
    tile["SPAN"] = min(G, 64 if K % 16 == 0 and not float32 else 32)
    return {"G": G} | tile | {"num_warps": 4, "num_stages": 3} | ROUNDED


def linear_dx(M: int, G: int, float32: bool) -> dict:
    """codebook_linear_dx_kernel: one span of columns, 64 rows of W at a time.

    In float32 there are no tensor cores, and a thread holds all it multiplies: half the rows.
    """
    tile = {"SPAN": min(G, 128), "BLOCK_M": tile_rows(M), "BLOCK_N": 32 if float32 else 64}
    return {"G": G} | tile | {"num_warps": 4 if M <= 32 else 8, "num_stages": 3} | ROUNDED


def dx_parts(N: int) -> int:
    """How many programs share the sum over N of one tile of dx: 512 rows of W each, at most 8."""
    return min(8, triton.cdiv(N, 512))


def adamw8bit(tensors: int) -> dict:
    """adamw8bit_kernel: 8 elements for each of 128 threads, four times."""
    search = {"SEARCH": 512, "SEARCHES": triton.cdiv(tensors, 512)}
    return {"TILE": 1024, "TILES": 4, "num_warps": 4} | search | ROUNDED


def lion8bit(tensors: int) -> dict:
    """lion8bit_kernel: the same for 256 threads of 4 elements; with 8 it spills on sm_120."""
    return adamw8bit(tensors) | {"num_warps": 8}


def adamw8bit_width(columns: int, aligned: bool) -> int:
    """The tile's elements of a row, among those that the kernels have code for."""
    if columns <= 16:
        return 16
    return 64 if columns <= 64 and aligned else 256


def softmax_cross_entropy(V: int) -> dict:
    """softmax_cross_entropy_kernel: 8 logits, two 16-byte loads, for each of 512 threads."""
    tile = {"LANES": 512, "EACH": 8, "V_TILES": triton.cdiv(V, 4096)}
    return tile | {"num_warps": 16} | ROUNDED


def tile_rows(M: int) -> int:
    """What holds M rows: tensor cores take 16 at least."""
    return 16 if M <= 16 else 32 if M <= 32 else 64


def _spans(K: int, G: int, most: int) -> dict:
    """A tile of one row of W in spans of one scale each."""
    span = min(G, _tile(K, most))
    return {"G": G, "SPAN": span, "SPANS": _tile(K, most) // span}


def _tile(K: int, most: int) -> int:
    """Elements of a row that a program takes at once: a power of two, from 32 to `most`."""
    return min(most, triton.next_power_of_2(max(K, 32)))
