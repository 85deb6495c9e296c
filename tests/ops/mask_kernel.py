"""Dropout's mask as a kernel of its own: imported where Triton is, interpreted or not."""

import triton
import triton.language as tl

from lowrank.kernels.lora_tile import kept


@triton.jit
def mask_kernel(
    row_ptr,  # int64 [4]
    seed_ptr,
    out_ptr,  # int8 [4, K]
    K,
    least_kept,
    BLOCK_K: tl.constexpr,
):
    row = tl.load(row_ptr + tl.arange(0, 4))
    k0 = tl.program_id(0) * BLOCK_K
    keep = kept(seed_ptr, row, k0, K, least_kept, BLOCK_K)
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    at = tl.arange(0, 4)[:, None] * K + k
    tl.store(out_ptr + at, keep.to(tl.int8), mask=k < K)
