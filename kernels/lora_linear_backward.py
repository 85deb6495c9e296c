"""The way back through LoRA's branch, in one pass over dy and one over x.

    g = scale dy B,  dB = scale dyᵀ h         by lora_dy_kernel, which reads dy once
    dA = gᵀ z,  dx = keep / (1 - p) ∘ (g A)   by lora_dx_kernel, which reads x once

A program has a block of columns and a chunk of rows of one adapter. It holds its block of dB (dA)
in registers while it goes down the rows, and each tile of dy also gives what its columns add to g.
Dropout is formed once a tile, for dA and dx alike: that takes as long as reading x (some 20
instructions an element: 11 us for 4096 x 4096 on an H200 against 8, by arithmetic).

Bytes, 16-bit: 2 M N for dy, 2 M K for x, 2 M K for dx, and float32 parts that stay in the cache:
4 M R for each block of columns, 4 N R and 4 K R for each chunk. Separate products would read dy and
x twice. Above 32 ranks the parts of g would outweigh that, and g is a pass of lora_shrink_kernel.

lora_sum_kernel adds the parts, always in one order: no atomics, the same bits on every run.
"""

import triton
import triton.language as tl

from lowrank.kernels.lora_tile import kept, product, rank_tile, rows_at, segment


@triton.jit(do_not_specialize=["M", "E"])
def lora_dy_kernel(
    dy_ptr,  # [M, N]
    b_ptr,  # [E, N, R]
    h_ptr,  # float32 [M, R], or None: no dB
    g_ptr,  # float32 [ceil(N / BLOCK_N), M, R]: what sums to dy B; or None: no g
    db_ptr,  # float32 [chunks, N, R]: what sums to dyᵀ h
    order_ptr,  # int32 [M], or None: one adapter for all rows
    offsets_ptr,  # int32 [E + 1], or None
    M,
    N,
    E,
    dy_stride,  # elements from row to row of dy
    R: tl.constexpr,
    CHUNK: tl.constexpr,  # rows in a chunk, a multiple of BLOCK_M
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,  # a power of two that holds E
    DOT: tl.constexpr,  # what tensor cores multiply dy and B in
    PRECISION: tl.constexpr,
):
    adapter, first, last = segment(offsets_ptr, tl.program_id(1), M, E, CHUNK, BLOCK_E)
    if first >= last:
        return
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_n = (n < N) & (adapter >= 0)  # without an adapter g = 0, whatever dy is
    inside_r = r < R
    if g_ptr is not None:
        b_at = (adapter.to(tl.int64) * N + n)[:, None] * R + r[None, :]
        b = tl.load(b_ptr + b_at, mask=inside_n[:, None] & inside_r[None, :], other=0.0)

    acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(0, CHUNK, BLOCK_M):
        place = first + start + tl.arange(0, BLOCK_M)
        inside_m = place < last
        row = rows_at(order_ptr, place, last)
        inside = inside_m[:, None] & inside_n[None, :]
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + n[None, :], mask=inside, other=0.0)
        if g_ptr is not None:
            g = product(dy, b, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), DOT, PRECISION)
            g_at = (tl.program_id(0).to(tl.int64) * M + row)[:, None] * R + r[None, :]
            tl.store(g_ptr + g_at, g, mask=inside_m[:, None] & inside_r[None, :])
        if h_ptr is not None:
            inside = inside_r[:, None] & inside_m[None, :]
            h = tl.load(h_ptr + row[None, :] * R + r[:, None], mask=inside, other=0.0)
            acc = product(h, dy, acc, tl.float32, PRECISION)

    if h_ptr is not None:
        at = (tl.program_id(1).to(tl.int64) * N + n)[:, None] * R + r[None, :]
        tl.store(db_ptr + at, tl.trans(acc), mask=inside_n[:, None] & inside_r[None, :])


@triton.jit(do_not_specialize=["M", "E", "least_kept"])
def lora_dx_kernel(
    x_ptr,  # [M, K], or None: no dA
    g_ptr,  # float32 [M, R]
    a_ptr,  # [E, R, K]
    dx_ptr,  # [M, K], or None: no dx
    da_ptr,  # float32 [chunks, R, K]: what sums to dA
    order_ptr,
    offsets_ptr,
    seed_ptr,  # int64, or None: nothing was dropped
    M,
    K,
    E,
    x_stride,  # elements from row to row of x
    least_kept,  # see `kept`
    keep_scale,  # 1 / (1 - p)
    R: tl.constexpr,
    CHUNK: tl.constexpr,  # rows in a chunk, a multiple of BLOCK_M
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Beyond BLOCK_R ranks a program has a block of dA's, or all of dx's: not both at once."""
    adapter, first, last = segment(offsets_ptr, tl.program_id(1), M, E, CHUNK, BLOCK_E)
    if first >= last:
        return
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_k = (k < K) & (adapter >= 0)
    a_ptr += adapter.to(tl.int64) * R * K
    if dx_ptr is not None:
        a = _a_tile(a_ptr, k, inside_k, 0, K, R, BLOCK_R)

    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in range(0, CHUNK, BLOCK_M):
        place = first + start + tl.arange(0, BLOCK_M)
        inside_m = place < last
        row = rows_at(order_ptr, place, last)
        if seed_ptr is not None:
            keep = kept(seed_ptr, row, k0, K, least_kept, BLOCK_K)
        if x_ptr is not None:
            inside = inside_m[:, None] & inside_k[None, :]
            z = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=inside, other=0.0)
            z = z.to(tl.float32)
            if seed_ptr is not None:
                z = tl.where(keep, z, 0.0)
            inside = (r < R)[:, None] & inside_m[None, :]
            g_t = tl.load(g_ptr + row[None, :] * R + r[:, None], mask=inside, other=0.0)
            acc = product(g_t, z, acc, tl.float32, PRECISION)
        if dx_ptr is not None:
            dx = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            g = rank_tile(g_ptr, row, inside_m, 0, R, BLOCK_R)
            dx = product(g, a, dx, tl.float32, PRECISION)
            for r0 in range(BLOCK_R, R, BLOCK_R):
                g = rank_tile(g_ptr, row, inside_m, r0, R, BLOCK_R)
                more = _a_tile(a_ptr, k, inside_k, r0, K, R, BLOCK_R)
                dx = product(g, more, dx, tl.float32, PRECISION)
            dx *= keep_scale
            if seed_ptr is not None:
                dx = tl.where(keep, dx, 0.0)
            inside = inside_m[:, None] & (k < K)[None, :]
            at = row[:, None] * K + k[None, :]
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)

    if x_ptr is not None:
        at = (tl.program_id(1).to(tl.int64) * R + r)[:, None] * K + k[None, :]
        tl.store(da_ptr + at, acc * keep_scale, mask=(r < R)[:, None] & inside_k[None, :])


@triton.jit(do_not_specialize=["parts"])
def lora_sum_kernel(
    parts_ptr,  # float32 [parts, size]
    out_ptr,  # [E, size]
    offsets_ptr,  # int32 [E + 1], or None: all parts are of the one output
    parts,
    size,
    chunk,  # rows for which there is a part
    scale,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,  # parts on their way at once
):
    """out[e] = scale * the sum of the parts of adapter e, in their order."""
    e = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if offsets_ptr is None:
        first, last = e * 0, e * 0 + parts
    else:
        low = tl.load(offsets_ptr + e)
        first = low // chunk + e + 1  # as in `segment`
        last = first + (tl.load(offsets_ptr + e + 1) - low + chunk - 1) // chunk
    total = tl.zeros([BLOCK], tl.float32)
    while first < last:
        for u in tl.static_range(UNROLL):
            part = first + u
            inside = (at < size) & (part < last)
            total += tl.load(parts_ptr + part.to(tl.int64) * size + at, mask=inside, other=0.0)
        first += UNROLL
    out = (total * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + e.to(tl.int64) * size + at, out, mask=at < size)


@triton.jit
def _a_tile(a_ptr, k, inside, r0, K, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """A [R, K] for these columns of x, and ranks from r0: [BLOCK_R, columns]."""
    r = r0 + tl.arange(0, BLOCK_R)
    at = r.to(tl.int64)[:, None] * K + k[None, :]
    return tl.load(a_ptr + at, mask=inside[None, :] & (r < R)[:, None], other=0.0)
