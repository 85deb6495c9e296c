"""What the kernels share: codes to entries of the codebook, and the scales of blocks.

Entries and scales come in float32, as the products of codebook_dequantize do, so that a weight has
the same bits whichever kernel decodes it.
"""

import triton
import triton.language as tl


@triton.jit
def entries(codebook_ptr, n, code, PER_ROW: tl.constexpr):
    """codebook[t, code] for codes of any shape; `n`, the rows, broadcasts to that shape.

    One table for all rows is 16 words of shared memory in 16 banks, where no two lanes conflict;
    a table for each row is read through the cache.
    """
    if PER_ROW:
        return tl.load(codebook_ptr + n * 16 + code)
    table = tl.load(codebook_ptr + tl.arange(0, 16))
    return tl.reshape(tl.gather(table, tl.reshape(code, [code.numel]), axis=0), code.shape)


@triton.jit
def scales(absmax_ptr, scale_ptr, n, block, blocks):
    """absmax[n, block] in float32, for the broadcast shape of `n` and `block`.

    Double-quantized, code * step + offset is rounded twice: launch with enable_fp_fusion=False.
    """
    at = n * blocks + tl.minimum(block, blocks - 1)  # past the end lie no weights, only zeros of x
    absmax = tl.load(absmax_ptr + at)
    if scale_ptr is not None:
        absmax = absmax.to(tl.float32) * tl.load(scale_ptr + 2 * n) + tl.load(scale_ptr + 2 * n + 1)
    return absmax
