"""Cross entropy of rows of logits and its gradient in their place, a program for each row.

The logits are read twice: once for their maximum and the sum of their exponentials together, once
for the gradient. A gradient of 16 bits goes to the first half of its row, as the second product
takes it; behind a barrier, so that no thread writes over logits that another has still to read.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_cross_entropy_kernel(
    logits_ptr,  # float32 [M, V]
    labels_ptr,  # int64 [M]
    losses_ptr,  # float32 [M]
    gradient_ptr,  # the same memory: [M, V] of its dtype, rows `gradient_stride` apart
    V,
    gradient_stride,
    scale,  # of the gradient: a power of two
    GRADIENT: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,  # logits of a lane at once
    V_TILES: tl.constexpr,  # ceil(V / (LANES * EACH))
):
    """losses = log Σ_v e^z[v] - z[label];  gradient = (e^z / Σ e^z - onehot(label)) scale."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * V
    label = tl.load(labels_ptr + row)
    at_label = tl.load(row_ptr + label)
    lane = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]  # [LANES, EACH]

    top = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for tile in range(V_TILES):
        v = tile * (LANES * EACH) + lane
        z = tl.load(row_ptr + v, mask=v < V, other=float("-inf"))
        before, top = top, tl.maximum(top, tl.max(z, axis=1))
        exps = tl.exp(z - finite(top)[:, None])
        total = total * tl.exp(before - finite(top)) + tl.sum(exps, axis=1)
    largest = tl.max(top, axis=0)
    shift = finite(largest)
    total = tl.sum(total * tl.exp(top - shift), axis=0)
    tl.store(losses_ptr + row, tl.log(total) + (shift - at_label))

    if GRADIENT:
        inverse = 1 / total
        for tile in range(V_TILES):
            v = tile * (LANES * EACH) + lane
            z = tl.load(row_ptr + v, mask=v < V, other=float("-inf"))
            tl.debug_barrier()
            p = tl.exp(z - shift) * inverse
            gradient = tl.where(v == label, p - 1, p) * scale
            at = row * gradient_stride + v
            tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def finite(x):
    """-inf - x would be NaN where all logits so far are -inf: their exponentials are 0."""
    return tl.where(x == float("-inf"), 0.0, x)
