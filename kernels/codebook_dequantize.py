"""Codes to weights: w[n, k] = codebook[n, code[n, k]] * absmax[n, k // G], in one pass.

Double-quantized scales are decoded here too, absmax = float32(code * step) + offset: 1/64 byte more
to read for each weight, against a launch and a float32 buffer of their own. Writing is about 80 %
of the traffic, so what matters is that a warp stores consecutive elements.
Launch with enable_fp_fusion=False: a fused multiply-add would round absmax once, the format twice.
"""

import triton
import triton.language as tl


@triton.jit
def codebook_dequantize_kernel(
    packed_ptr,  # uint8 [N, Kp / 2], even elements in the high nibbles
    absmax_ptr,  # float32 [N, blocks], or uint8 codes where scale_ptr is given
    scale_ptr,  # float32 [N, 2] = (step, offset), or None
    codebook_ptr,  # float32 [T, 16]
    out_ptr,  # [N, K]
    K,
    row_bytes,  # Kp / 2
    blocks,  # ceil(K / G)
    codebook_stride,  # 16 if each row has its table, 0 if all share one
    G: tl.constexpr,
    SPAN: tl.constexpr,  # elements that share a scale, loaded once and broadcast; at most G
    SPANS: tl.constexpr,  # spans for one program
):
    n = tl.program_id(0).to(tl.int64)
    k0 = tl.program_id(1) * (SPANS * SPAN)
    start = k0 + tl.arange(0, SPANS) * SPAN  # [SPANS]
    if scale_ptr is not None:
        code = tl.load(absmax_ptr + n * blocks + start // G, mask=start < K, other=0)
        step = tl.load(scale_ptr + 2 * n)
        offset = tl.load(scale_ptr + 2 * n + 1)
        absmax = code.to(tl.float32) * step + offset
    else:
        absmax = tl.load(absmax_ptr + n * blocks + start // G, mask=start < K, other=0.0)

    byte_at = k0 // 2 + tl.arange(0, SPANS * SPAN // 2)
    byte = tl.load(packed_ptr + n * row_bytes + byte_at, mask=byte_at < row_bytes, other=0)
    table = tl.load(codebook_ptr + n * codebook_stride + tl.arange(0, 16))
    even = tl.gather(table, (byte >> 4).to(tl.int32), axis=0)  # [SPANS * SPAN / 2]
    odd = tl.gather(table, (byte & 0xF).to(tl.int32), axis=0)

    value = tl.reshape(tl.interleave(even, odd), [SPANS, SPAN]) * absmax[:, None]
    k = start[:, None] + tl.arange(0, SPAN)[None, :]
    tl.store(out_ptr + n * K + k, value.to(out_ptr.dtype.element_ty), mask=k < K)
