"""One step of 8-bit Lion over a whole list of tensors in one launch; see `adamw8bit.py`.

The table has the moment twice, where AdamW has its two. Every float32 operation is rounded by
itself, in the order of `lowrank.ops.lion8bit.Coefficients`: launch with enable_fp_fusion=False.
"""

import triton
import triton.language as tl

from lowrank.kernels.adamw8bit import (
    BLOCKS,
    COLUMNS,
    DTYPE,
    FIRST,
    M_SCALE,
    ZERO_OF_M,
    G,
    M,
    P,
    addresses,
    by_width,
    entry_of,
    load_pair,
    looked_up,
    pointer,
    store,
    store_signed,
)


@triton.jit(do_not_specialize=["tensors"])
def lion8bit_kernel(
    table_ptr,
    tensors,
    maps_ptr,  # int32 [6, 256], of which the first three rows are m's
    beta1,
    rest1,
    beta2,
    rest2,
    decay,
    rate,
    below,  # 1 / the least value of the map of m
    TILE: tl.constexpr,  # elements at once
    TILES: tl.constexpr,  # tiles of one program, one after another
    SEARCH: tl.constexpr,  # tensors looked at together, SEARCHES times
    SEARCHES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    entry_ptr = entry_of(table_ptr, tensors, program, SEARCH, SEARCHES)
    numbers = (beta1, rest1, beta2, rest2, decay, rate, below)
    by_width(step_blocks, entry_ptr, tensors, program, maps_ptr, numbers, TILE, TILES)


@triton.jit
def step_blocks(
    entry_ptr,
    tensors,
    program,
    maps_ptr,
    numbers,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,  # elements of a block that there can be: 256, or what holds a row
    ALIGNED: tl.constexpr,
):
    """The program's share of the tensor at `entry_ptr`: TILES * TILE / WIDTH blocks."""
    beta1, rest1, beta2, rest2, decay, rate, below = numbers
    p_at = tl.load(entry_ptr + P * tensors)
    g_at = tl.load(entry_ptr + G * tensors)
    m_ptr = pointer(tl.load(entry_ptr + M * tensors), tl.uint8, ALIGNED)
    columns = tl.load(entry_ptr + COLUMNS * tensors)
    if ALIGNED:
        columns = tl.multiple_of(columns, 8)
    m_scale_ptr = pointer(tl.load(entry_ptr + M_SCALE * tensors), tl.float32, False)
    blocks = tl.load(entry_ptr + BLOCKS * tensors).to(tl.int32)
    dtype = tl.load(entry_ptr + DTYPE * tensors)

    ROWS: tl.constexpr = TILE // WIDTH
    start = ((program - tl.load(entry_ptr + FIRST * tensors)) * (TILES * ROWS)).to(tl.int32)
    for i in range(TILES):
        if start + i * ROWS < blocks:
            block, exists, at, inside = addresses(
                start + i * ROWS, columns, blocks, ROWS, WIDTH, ALIGNED
            )
            p, g = load_pair(p_at, g_at, at, inside, dtype, ALIGNED)
            m = tl.load(m_ptr + at, mask=inside, other=ZERO_OF_M)
            m_scale = tl.load(m_scale_ptr + block, mask=exists, other=0.0)[:, None]
            m = looked_up(maps_ptr, 0, m.to(tl.int32)).to(tl.float32, bitcast=True) * m_scale
            c = m * beta1 + g * rest1
            way = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, 0.0)) + c * 0.0  # NaN of NaN and inf
            store(p_at, at, p * decay - way * rate, inside, dtype, ALIGNED)
            m = m * beta2 + g * rest2
            store_signed(m_ptr, m_scale_ptr, maps_ptr, m, below, block, exists, at, inside)
