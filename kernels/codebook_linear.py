"""y = x Wᵀ + b for few rows of x, W decoded in registers from its packed codes.

A byte holds the elements 2i and 2i + 1 of a row, so W is never interleaved: the sum over k is that
over the even elements and that over the odd, each against its half of x. Every program owns
its outputs and adds in one order: no atomics, the same bits on every run. Rows of W past N repeat
the last, and are not stored. Launch with enable_fp_fusion=False, see `codebook_tile`.

A branch of LoRA joins the float32 sums before they are rounded: as scale h Bᵀ, formed here from
the parts of h that lora_shrink_kernel leaves, so that two launches do a whole layer; or, for the
rows of several adapters, as an addend.
"""

import triton
import triton.language as tl

from lowrank.kernels.codebook_tile import entries, scales
from lowrank.kernels.lora_tile import b_tile, branch, summed_h


@triton.jit
def codebook_linear_row_kernel(
    x_ptr,  # [1, K]
    packed_ptr,  # uint8 [N, Kp / 2]
    absmax_ptr,  # float32 [N, blocks], or uint8 codes where scale_ptr is given
    scale_ptr,  # float32 [N, 2] = (step, offset), or None
    codebook_ptr,  # float32 [T, 16]
    bias_ptr,  # [N], or None
    y_ptr,  # [1, N]
    N,
    row_bytes,  # Kp / 2
    blocks,  # ceil(K / G)
    K: tl.constexpr,  # a model has few, and the loop over it is then of a known length
    G: tl.constexpr,
    PER_ROW: tl.constexpr,  # each row has its table, else all share one
    SPAN: tl.constexpr,  # elements that share a scale; min(G, those of a tile's row)
    SPANS: tl.constexpr,  # spans in a tile's row
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # tiles in flight
    addend_ptr=None,  # float32 [1, N]
    parts_ptr=None,  # float32 [PARTS, 1, R]: what sums to h
    b_ptr=None,  # [N, R]
    h_ptr=None,  # float32 [1, R], written if PARTS > 1
    scale=0.0,
    R: tl.constexpr = 0,
    PARTS: tl.constexpr = 1,
    BLOCK_R: tl.constexpr = 16,
):
    """One row of x: there is nothing for tensor cores, so each thread multiplies and adds float32.

    The threads of a program divide K among them, and the scale is applied to each pair's sum.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]  # [BLOCK_N, 1]
    span = tl.arange(0, SPANS)
    pair = tl.arange(0, SPAN // 2)
    half = span[:, None] * (SPAN // 2) + pair[None, :]  # [SPANS, SPAN / 2]
    both = tl.arange(0, 2)[None, None, :]

    acc = tl.zeros([BLOCK_N, SPANS, SPAN // 2], tl.float32)
    for k0 in tl.range(0, K, SPANS * SPAN, num_stages=STAGES):
        byte_at = k0 // 2 + half
        byte = tl.load(
            packed_ptr + row[:, :, None] * row_bytes + byte_at[None, :, :],
            mask=(byte_at < row_bytes)[None, :, :],
            other=0,
        ).to(tl.int32)
        k = 2 * byte_at[:, :, None] + both
        x_even, x_odd = tl.split(tl.load(x_ptr + k, mask=k < K, other=0.0))
        absmax = scales(absmax_ptr, scale_ptr, row, (k0 + span * SPAN)[None, :] // G, blocks)
        even = entries(codebook_ptr, row[:, :, None], byte >> 4, PER_ROW)
        odd = entries(codebook_ptr, row[:, :, None], byte & 0xF, PER_ROW)
        x_even = x_even.to(tl.float32)[None, :, :]
        sums = tl.fma(odd, x_odd.to(tl.float32)[None, :, :], even * x_even)
        acc = tl.fma(sums, absmax[:, :, None], acc)
    y = tl.sum(tl.reshape(acc, [BLOCK_N, SPANS * SPAN // 2]), axis=1)

    if parts_ptr is not None:
        only = tl.arange(0, 1).to(tl.int64)
        low_rank = tl.zeros([BLOCK_N], tl.float32)
        for r0 in tl.static_range(0, R, BLOCK_R):
            h = summed_h(parts_ptr, only, only == 0, r0, 1, R, PARTS, BLOCK_R)  # [1, BLOCK_R]
            b = b_tile(b_ptr, n, n < N, r0, R, BLOCK_R).to(tl.float32)
            low_rank += tl.sum(tl.trans(h) * b, axis=0)
            if PARTS > 1:
                r = r0 + tl.arange(0, BLOCK_R)[None, :]
                tl.store(h_ptr + r, h, mask=(r < R) & (tl.program_id(0) == 0))
        y += low_rank * scale
    if addend_ptr is not None:
        y += tl.load(addend_ptr + n, mask=n < N, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def codebook_linear_kernel(
    x_ptr,  # [M, K]
    packed_ptr,
    absmax_ptr,
    scale_ptr,
    codebook_ptr,
    bias_ptr,
    y_ptr,  # [M, N]
    M,
    N,
    x_stride,  # elements from row to row of x
    row_bytes,
    blocks,
    K: tl.constexpr,
    G: tl.constexpr,
    PER_ROW: tl.constexpr,
    SPAN: tl.constexpr,  # elements of a row multiplied at once; divides G
    SPLITS: tl.constexpr,  # parts of K that a program sums side by side: one for each warp, or 1
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,  # what tensor cores multiply: the dtype of x; float32 in the interpreter
    addend_ptr=None,  # float32 [M, N]
    parts_ptr=None,
    b_ptr=None,
    h_ptr=None,
    scale=0.0,
    R: tl.constexpr = 0,
    PARTS: tl.constexpr = 1,
    BLOCK_R: tl.constexpr = 16,
    PRECISION: tl.constexpr = "ieee",  # of the branch's product
):
    """A tile of y. The weight is rounded to the dtype of x, as in the product over scratch.

    With SPLITS > 1 each warp has its own part of K and its own sums, added up at the end: more of a
    small N is in flight than by one warp after another.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(n, N - 1).to(tl.int64)[None, None, :]  # [1, 1, BLOCK_N]
    x_row = m.to(tl.int64)[None, :, None, None] * x_stride
    span = tl.arange(0, SPLITS)[:, None]  # [SPLITS, 1]
    half = span * (SPAN // 2) + tl.arange(0, SPAN // 2)[None, :]  # [SPLITS, SPAN / 2]
    both = tl.arange(0, 2)[None, None, None, :]

    if SPLITS > 1:
        acc = tl.zeros([SPLITS, BLOCK_M, BLOCK_N], tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, SPLITS * SPAN):
        byte_at = (k0 // 2 + half)[:, :, None]  # [SPLITS, SPAN / 2, 1]
        byte = tl.load(
            packed_ptr + row * row_bytes + byte_at, mask=byte_at < row_bytes, other=0
        ).to(tl.int32)
        k = 2 * (k0 // 2 + half)[:, None, :, None] + both  # [SPLITS, 1, SPAN / 2, 2]
        inside = (m < M)[None, :, None, None] & (k < K)
        x_even, x_odd = tl.split(tl.load(x_ptr + x_row + k, mask=inside, other=0.0))
        absmax = scales(absmax_ptr, scale_ptr, row, ((k0 + span * SPAN) // G)[:, :, None], blocks)
        even = (entries(codebook_ptr, row, byte >> 4, PER_ROW) * absmax).to(x_even.dtype).to(DOT)
        odd = (entries(codebook_ptr, row, byte & 0xF, PER_ROW) * absmax).to(x_even.dtype).to(DOT)
        x_even = x_even.to(DOT)  # [SPLITS, BLOCK_M, SPAN / 2]
        x_odd = x_odd.to(DOT)
        if SPLITS == 1:
            even = tl.reshape(even, [SPAN // 2, BLOCK_N])
            odd = tl.reshape(odd, [SPAN // 2, BLOCK_N])
            x_even = tl.reshape(x_even, [BLOCK_M, SPAN // 2])
            x_odd = tl.reshape(x_odd, [BLOCK_M, SPAN // 2])
        acc = tl.dot(x_even, even, acc, input_precision="ieee")
        acc = tl.dot(x_odd, odd, acc, input_precision="ieee")
    y = tl.sum(acc, axis=0) if SPLITS > 1 else acc

    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    if parts_ptr is not None:
        low_rank = branch(
            parts_ptr,
            b_ptr,
            h_ptr,
            m.to(tl.int64),
            m < M,
            n,
            n < N,
            tl.program_id(0) == 0,
            M,
            R,
            PARTS,
            BLOCK_R,
            PRECISION,
        )
        y += low_rank * scale
    if addend_ptr is not None:
        y += tl.load(addend_ptr + at, mask=inside, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
