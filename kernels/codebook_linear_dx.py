"""dx = dy W for few rows of dy, from the packed codes that the forward reads.

A tile of W [rows n, bytes along k] is the second operand as it lies in memory: n is what is summed
over, and the even and the odd elements of a row are two products, put side by side at the store.
Launch with enable_fp_fusion=False, see `codebook_tile`.
"""

import triton
import triton.language as tl

from lowrank.kernels.codebook_tile import entries, scales


@triton.jit
def codebook_linear_dx_kernel(
    dy_ptr,  # [M, N]
    packed_ptr,  # uint8 [N, Kp / 2]
    absmax_ptr,  # float32 [N, blocks], or uint8 codes where scale_ptr is given
    scale_ptr,  # float32 [N, 2] = (step, offset), or None
    codebook_ptr,  # float32 [T, 16]
    dx_ptr,  # [parts, M, K]: sums over a part of the rows each
    M,
    N,
    K,
    dy_stride,  # elements from row to row of dy
    row_bytes,  # Kp / 2
    blocks,  # ceil(K / G)
    PART: tl.constexpr,  # rows of W in a part, a multiple of BLOCK_N
    G: tl.constexpr,
    PER_ROW: tl.constexpr,  # each row has its table, else all share one
    SPAN: tl.constexpr,  # columns of dx for one program; divides G
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,  # what tensor cores multiply: the dtype of dy; float32 in the interpreter
):
    byte_at = tl.program_id(0) * (SPAN // 2) + tl.arange(0, SPAN // 2)  # [SPAN / 2]
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    dy_row = m.to(tl.int64)[:, None] * dy_stride
    block = tl.program_id(0) * SPAN // G
    first = tl.program_id(2) * PART
    last = tl.minimum(first + PART, N)

    acc_even = tl.zeros([BLOCK_M, SPAN // 2], tl.float32)
    acc_odd = tl.zeros([BLOCK_M, SPAN // 2], tl.float32)
    for n0 in range(0, PART, BLOCK_N):
        n = first + n0 + tl.arange(0, BLOCK_N)
        row = tl.minimum(n, N - 1).to(tl.int64)[:, None]  # [BLOCK_N, 1]
        byte = tl.load(
            packed_ptr + row * row_bytes + byte_at[None, :],
            mask=(byte_at < row_bytes)[None, :],
            other=0,
        ).to(tl.int32)
        inside = (m < M)[:, None] & (n < last)[None, :]
        dy = tl.load(dy_ptr + dy_row + n[None, :], mask=inside, other=0.0)
        absmax = scales(absmax_ptr, scale_ptr, row, block, blocks)  # [BLOCK_N, 1]
        even = (entries(codebook_ptr, row, byte >> 4, PER_ROW) * absmax).to(dy.dtype).to(DOT)
        odd = (entries(codebook_ptr, row, byte & 0xF, PER_ROW) * absmax).to(dy.dtype).to(DOT)
        acc_even = tl.dot(dy.to(DOT), even, acc_even, input_precision="ieee")
        acc_odd = tl.dot(dy.to(DOT), odd, acc_odd, input_precision="ieee")

    k = 2 * byte_at[None, :, None] + tl.arange(0, 2)[None, None, :]  # [1, SPAN / 2, 2]
    at = (tl.program_id(2).to(tl.int64) * M + m)[:, None, None] * K + k
    dx = tl.join(acc_even, acc_odd).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + at, dx, mask=(m < M)[:, None, None] & (k < K))


@triton.jit
def sum_parts_kernel(
    parts_ptr,  # float32 [parts, size]
    out_ptr,  # [size]
    size,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the sum of the parts, in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    part_ptr = parts_ptr + at
    for _ in range(PARTS):
        total += tl.load(part_ptr, mask=at < size, other=0.0)
        part_ptr += size
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)
