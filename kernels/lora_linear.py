"""The branch of LoRA on its way forward: h = z Aᵀ and y = scale h Bᵀ + b, z = x ∘ keep / (1 - p).

h is one pass over x, with dropout formed in registers: 2 M K bytes of 16-bit x, where the plain
steps read and write x and a mask, 7 M K in all. y is written once, 2 M N bytes, before cuBLAS adds
the base's product to it (beta = 1: y is read in that epilogue). In work the branch is R (1/N + 1/K)
of the base: what counts is bytes, and for few rows launches.

Sums over K are split in parts where the rows alone are too few programs for a GPU. Whoever reads h
adds the parts up, in their order, which saves a launch. No atomics: the same bits on every run.
What is rank-wide is float32 and meets 16-bit operands as TF32, of 11 bits; bfloat16 has 8.
"""

import triton
import triton.language as tl

from lowrank.kernels.lora_tile import branch, kept, product, rows_at, segment


@triton.jit(do_not_specialize=["M", "E", "least_kept"])
def lora_shrink_kernel(
    x_ptr,  # [M, K]
    a_ptr,  # [E, R, K], or [E, K, R] if RANK_LAST
    parts_ptr,  # float32 [parts, M, R]: what sums to the result
    order_ptr,  # int32 [M], or None: one adapter for all rows
    offsets_ptr,  # int32 [E + 1], or None
    seed_ptr,  # int64, or None: nothing is dropped
    M,
    K,
    E,
    x_stride,  # elements from row to row of x
    least_kept,  # see `kept`
    factor,  # on the result: 1 / (1 - p), or LoRA's scale
    R: tl.constexpr,
    RANK_LAST: tl.constexpr,
    PART: tl.constexpr,  # columns in a part, a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,  # a power of two that holds E
    DOT: tl.constexpr,  # what tensor cores multiply x and A in
    PRECISION: tl.constexpr,
):
    """h of x and A; or g = scale dy B of dy and B, whose ranks come last."""
    adapter, first, last = segment(offsets_ptr, tl.program_id(0), M, E, BLOCK_M, BLOCK_E)
    if first >= last:
        return
    place = first + tl.arange(0, BLOCK_M)
    row = rows_at(order_ptr, place, last)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_m = (place < last) & (adapter >= 0)  # without an adapter h = 0, whatever x is
    a_ptr += adapter.to(tl.int64) * R * K

    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, PART, BLOCK_K):
        k0 = tl.program_id(2) * PART + start
        k = k0 + tl.arange(0, BLOCK_K)
        inside = inside_m[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=inside, other=0.0).to(DOT)
        if seed_ptr is not None:
            keep = kept(seed_ptr, row, k0, K, least_kept, BLOCK_K)
            x = tl.where(keep, x, tl.zeros_like(x))
        if RANK_LAST:
            at = k.to(tl.int64)[:, None] * R + r[None, :]
        else:
            at = r.to(tl.int64)[None, :] * K + k[:, None]
        inside = (k < K)[:, None] & ((r < R) & (adapter >= 0))[None, :]
        a = tl.load(a_ptr + at, mask=inside, other=0.0)
        acc = product(x, a, acc, DOT, PRECISION)

    at = (tl.program_id(2).to(tl.int64) * M + row)[:, None] * R + r[None, :]
    inside = (place < last)[:, None] & (r < R)[None, :]
    tl.store(parts_ptr + at, acc * factor, mask=inside)


@triton.jit(do_not_specialize=["M", "E"])
def lora_expand_kernel(
    parts_ptr,  # float32 [PARTS, M, R]: what sums to h
    b_ptr,  # [E, N, R]
    bias_ptr,  # [N], or None
    h_ptr,  # float32 [M, R], written if PARTS > 1
    y_ptr,  # [M, N]
    order_ptr,
    offsets_ptr,
    M,
    N,
    E,
    scale,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of y."""
    adapter, first, last = segment(offsets_ptr, tl.program_id(0), M, E, BLOCK_M, BLOCK_E)
    if first >= last:
        return
    place = first + tl.arange(0, BLOCK_M)
    row = rows_at(order_ptr, place, last)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = branch(
        parts_ptr,
        b_ptr + adapter.to(tl.int64) * N * R,
        h_ptr,
        row,
        place < last,
        n,
        (n < N) & (adapter >= 0),  # h = 0 without an adapter; so is what it is multiplied by
        tl.program_id(1) == 0,
        M,
        R,
        PARTS,
        BLOCK_R,
        PRECISION,
    )
    y *= scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (place < last)[:, None] & (n < N)[None, :]
    at = row[:, None] * N + n[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
