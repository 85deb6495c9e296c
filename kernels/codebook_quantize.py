"""Weights to codes: code[n, k] = how many midpoints of the codebook are < w[n, k] / absmax.

A block G of a row is in one program, so its largest magnitude and its codes come of one read. That
largest is found among the bits as integers, whose order is that of the magnitudes with NaN above
infinity: a block that is not finite shows in its absmax. A full block multiplies by the reciprocal
and a short last one divides, as bitsandbytes does; both quotients are rounded as IEEE says.
"""

import triton
import triton.language as tl


@triton.jit
def codebook_quantize_kernel(
    weight_ptr,  # [N, K]
    mids_ptr,  # float32 [T, 15]: between neighbours of each sorted table
    order_ptr,  # int32 [T, 16]: the code of each sorted entry
    packed_ptr,  # uint8 [N, Kp / 2]
    absmax_ptr,  # float32 [N, blocks]
    K,
    weight_stride,  # elements from row to row
    row_bytes,  # Kp / 2
    blocks,  # ceil(K / G)
    G: tl.constexpr,
    SPANS: tl.constexpr,  # blocks for one program; a power of two
    PER_ROW: tl.constexpr,  # each row has its table, else all share one
):
    n = tl.program_id(0).to(tl.int64)
    table = n if PER_ROW else 0
    first = tl.program_id(1) * SPANS
    block = first + tl.arange(0, SPANS)
    k = block[:, None] * G + tl.arange(0, G)[None, :]  # [SPANS, G]
    w = tl.load(weight_ptr + n * weight_stride + k, mask=k < K, other=0.0).to(tl.float32)

    magnitude = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    absmax = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)  # [SPANS]
    tl.store(absmax_ptr + n * blocks + block, absmax, mask=block < blocks)

    least = tl.full([SPANS], 1e-38, tl.float32)  # a plain 1e-38, subnormal, would be a float64
    divisor = tl.maximum(absmax, least, propagate_nan=tl.PropagateNan.ALL)
    reciprocal = tl.div_rn(tl.full([SPANS], 1.0, tl.float32), divisor)[:, None]
    quotient = tl.div_rn(w, tl.broadcast_to(divisor[:, None], [SPANS, G]))
    s = tl.where(((block + 1) * G <= K)[:, None], w * reciprocal, quotient)
    s = tl.clamp(s, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)

    rank = tl.zeros([SPANS, G], tl.int32)
    for i in tl.static_range(15):
        rank += (s > tl.load(mids_ptr + table * 15 + i)).to(tl.int32)
    order = tl.load(order_ptr + table * 16 + tl.arange(0, 16))
    code = tl.gather(order, tl.reshape(rank, [SPANS * G]), axis=0)
    code = tl.where(tl.reshape(k, [SPANS * G]) < K, code, 0)  # pads are written as 0
    even, odd = tl.split(tl.reshape(code, [SPANS * G // 2, 2]))
    byte_at = first * (G // 2) + tl.arange(0, SPANS * G // 2)
    byte = ((even << 4) | odd).to(tl.uint8)
    tl.store(packed_ptr + n * row_bytes + byte_at, byte, mask=byte_at < row_bytes)
