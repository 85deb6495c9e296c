"""One step of 8-bit AdamW over a whole list of tensors in one launch.

A table on the device holds the addresses and the layout of every tensor; a program finds its own
among them, then takes some blocks of 256 elements: codes to moments, moments and parameters on by
one step, moments to codes again, all in registers. Every float32 operation is rounded by itself, in
the order of `lowrank.ops.adamw8bit.Coefficients`: launch with enable_fp_fusion=False.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(256)  # elements of a row that share a scale
ZERO_OF_M = tl.constexpr(127)  # the code of 0 in m; in v it is 0
SMALLEST = tl.constexpr(0x00800000)  # the least normal float32: its reciprocal is finite
LOWEST = tl.constexpr(0x34800000)  # 2^-22: no midpoint is below it
HIGHEST = tl.constexpr(0x3F800000)  # 1

# Rows of the table, int64 [12, tensors]; `lowrank.ops.triton.moments8bit` fills them.
FIRST = tl.constexpr(0)  # the tensor's first program
P, G, M, V, M_SCALE, V_SCALE = (tl.constexpr(i) for i in range(1, 7))  # addresses
BLOCKS = tl.constexpr(7)
COLUMNS = tl.constexpr(8)
DTYPE = tl.constexpr(9)  # of p and g: 0 float32, 1 float16, 2 bfloat16
WIDTH_OF_TILE = tl.constexpr(10)
ALIGNED_ROWS = tl.constexpr(11)  # whether all addresses and rows allow loads of 8 elements


@triton.jit(do_not_specialize=["tensors"])
def adamw8bit_kernel(
    table_ptr,
    tensors,
    maps_ptr,  # int32 [6, 256]: of m, then of v: the codes' values, lines and midpoints
    beta1,
    rest1,
    beta2,
    rest2,
    decay,
    rate,
    root2,
    eps,
    below,  # 1 / the least value of the map of m
    TILE: tl.constexpr,  # elements at once
    TILES: tl.constexpr,  # tiles of one program, one after another
    SEARCH: tl.constexpr,  # tensors looked at together, SEARCHES times
    SEARCHES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    entry_ptr = entry_of(table_ptr, tensors, program, SEARCH, SEARCHES)
    numbers = (beta1, rest1, beta2, rest2, decay, rate, root2, eps, below)
    by_width(step_blocks, entry_ptr, tensors, program, maps_ptr, numbers, TILE, TILES)


@triton.jit
def by_width(
    step: tl.constexpr,  # the step_blocks of an optimizer
    entry_ptr,
    tensors,
    program,
    maps_ptr,
    numbers,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Rows shorter than a block get narrower tiles, or most threads would have nothing to do."""
    width = tl.load(entry_ptr + WIDTH_OF_TILE * tensors)
    aligned = tl.load(entry_ptr + ALIGNED_ROWS * tensors) != 0
    if aligned:
        if width == 16:
            step(entry_ptr, tensors, program, maps_ptr, numbers, TILE, TILES, 16, True)
        elif width == 64:
            step(entry_ptr, tensors, program, maps_ptr, numbers, TILE, TILES, 64, True)
        else:
            step(entry_ptr, tensors, program, maps_ptr, numbers, TILE, TILES, BLOCK, True)
    else:  # an address for each element: fewer of them at once
        if width == 16:
            step(entry_ptr, tensors, program, maps_ptr, numbers, TILE // 4, TILES * 4, 16, False)
        else:
            step(entry_ptr, tensors, program, maps_ptr, numbers, TILE // 4, TILES * 4, BLOCK, False)


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
    beta1, rest1, beta2, rest2, decay, rate, root2, eps, below = numbers
    p_at = tl.load(entry_ptr + P * tensors)
    g_at = tl.load(entry_ptr + G * tensors)
    m_ptr = pointer(tl.load(entry_ptr + M * tensors), tl.uint8, ALIGNED)
    v_ptr = pointer(tl.load(entry_ptr + V * tensors), tl.uint8, ALIGNED)
    columns = tl.load(entry_ptr + COLUMNS * tensors)
    if ALIGNED:
        columns = tl.multiple_of(columns, 8)
    m_scale_ptr = pointer(tl.load(entry_ptr + M_SCALE * tensors), tl.float32, False)
    v_scale_ptr = pointer(tl.load(entry_ptr + V_SCALE * tensors), tl.float32, False)
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
            v = tl.load(v_ptr + at, mask=inside, other=0)
            m_scale = tl.load(m_scale_ptr + block, mask=exists, other=0.0)[:, None]
            v_scale = tl.load(v_scale_ptr + block, mask=exists, other=0.0)[:, None]
            m = looked_up(maps_ptr, 0, m.to(tl.int32)).to(tl.float32, bitcast=True) * m_scale
            v = looked_up(maps_ptr, 3, v.to(tl.int32)).to(tl.float32, bitcast=True) * v_scale
            m = m * beta1 + g * rest1
            v = v * beta2 + g * g * rest2
            ratio = tl.div_rn(m, tl.sqrt_rn(v) * root2 + eps)
            store(p_at, at, p * decay - ratio * rate, inside, dtype, ALIGNED)

            store_signed(m_ptr, m_scale_ptr, maps_ptr, m, below, block, exists, at, inside)
            s, scale = scaled(v, v)
            tl.store(v_scale_ptr + block, scale, mask=exists)
            code = tl.where(s == 0, 0, 1 + nearest(maps_ptr, 4, s))
            tl.store(v_ptr + at, code.to(tl.uint8), mask=inside)


@triton.jit
def entry_of(table_ptr, tensors, program, SEARCH: tl.constexpr, SEARCHES: tl.constexpr):
    """Where the table has the program's tensor: the last that begins with it or before."""
    after = tl.zeros([SEARCH], tl.int32)
    for i in range(SEARCHES):
        t = i * SEARCH + tl.arange(0, SEARCH)
        first = tl.load(table_ptr + t, mask=t < tensors, other=9223372036854775807)
        after += (first <= program).to(tl.int32)
    return table_ptr + tl.sum(after, axis=0) - 1


@triton.jit
def addresses(
    start, columns, blocks, ROWS: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr
):
    """ROWS blocks from `start` on: their numbers, which exist, their elements, which exist."""
    block = start + tl.arange(0, ROWS)
    row, first = block.to(tl.int64), tl.zeros([ROWS], tl.int64)
    if WIDTH == BLOCK:
        in_row = ((columns + BLOCK - 1) // BLOCK).to(tl.int32)
        row, first = (block // in_row).to(tl.int64), (block % in_row).to(tl.int64) * BLOCK
    length = tl.minimum(columns - first, WIDTH).to(tl.int32)
    if ALIGNED:
        length = tl.multiple_of(length, 8)
    lane = tl.arange(0, WIDTH)[None, :]
    at = (row * columns + first)[:, None] + lane  # [ROWS, WIDTH]
    exists = block < blocks
    return block, exists, at, exists[:, None] & (lane < length[:, None])


@triton.jit
def store_signed(m_ptr, m_scale_ptr, maps_ptr, m, below, block, exists, at, inside):
    """Codes and scales of m. Its map has 1 and not -1: its least value has to reach any m < 0."""
    s, scale = scaled(m, tl.where(m < 0, m * below, m))
    tl.store(m_scale_ptr + block, scale, mask=exists)
    distance = nearest(maps_ptr, 1, s)
    negative = s.to(tl.int32, bitcast=True) < 0
    code = tl.maximum(tl.where(negative, ZERO_OF_M - distance, ZERO_OF_M + distance), 0)
    tl.store(m_ptr + at, code.to(tl.uint8), mask=inside)


@triton.jit
def pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = address.to(tl.pointer_type(dtype))
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr


@triton.jit
def load_pair(p_at, g_at, at, inside, dtype, ALIGNED: tl.constexpr):
    """p and g in float32 from addresses of elements of `dtype`."""
    if dtype == 0:
        p = tl.load(pointer(p_at, tl.float32, ALIGNED) + at, mask=inside, other=0.0)
        g = tl.load(pointer(g_at, tl.float32, ALIGNED) + at, mask=inside, other=0.0)
    elif dtype == 1:
        p16 = tl.load(pointer(p_at, tl.float16, ALIGNED) + at, mask=inside, other=0.0)
        g16 = tl.load(pointer(g_at, tl.float16, ALIGNED) + at, mask=inside, other=0.0)
        p, g = p16.to(tl.float32), g16.to(tl.float32)
    else:
        pb = tl.load(pointer(p_at, tl.bfloat16, ALIGNED) + at, mask=inside, other=0.0)
        gb = tl.load(pointer(g_at, tl.bfloat16, ALIGNED) + at, mask=inside, other=0.0)
        p, g = pb.to(tl.float32), gb.to(tl.float32)
    return p, g


@triton.jit
def store(p_at, at, p, inside, dtype, ALIGNED: tl.constexpr):
    if dtype == 0:
        tl.store(pointer(p_at, tl.float32, ALIGNED) + at, p, mask=inside)
    elif dtype == 1:
        tl.store(pointer(p_at, tl.float16, ALIGNED) + at, p.to(tl.float16), mask=inside)
    else:
        tl.store(pointer(p_at, tl.bfloat16, ALIGNED) + at, p.to(tl.bfloat16), mask=inside)


@triton.jit
def looked_up(maps_ptr, MAP: tl.constexpr, index):
    table = tl.load(maps_ptr + MAP * 256 + tl.arange(0, 256))
    return tl.reshape(tl.gather(table, tl.reshape(index, [index.numel]), axis=0), index.shape)


@triton.jit
def scaled(values, magnitude):
    """values / scale, and the scale of each row: its largest magnitude, or 0 if that is subnormal.

    As integers the bits of magnitudes have their order, with NaN above infinity.
    """
    largest = tl.max(magnitude.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = tl.where(largest < SMALLEST, 0, largest)
    scale = largest.to(tl.float32, bitcast=True)
    divisor = tl.where(largest == 0, 1.0, scale)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), divisor)
    inverse = tl.where(largest == 0, 0.0, inverse)
    return values * inverse[:, None], scale


@triton.jit
def nearest(maps_ptr, LINES: tl.constexpr, s):
    """How many midpoints between neighbours of a map are below |s|.

    The line of the eighth of an octave that |s| is in, in 64ths its height in the upper half of an
    integer and its rise in the lower, tells this number or one less: one midpoint decides.
    """
    bits = s.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.minimum(tl.maximum(bits, LOWEST), HIGHEST)
    line = looked_up(maps_ptr, LINES, (bits - LOWEST) >> 20)
    inside = (bits << 12).to(tl.uint32, bitcast=True)  # 2^-32 of the eighth
    rise = tl.umulhi(inside, (line & 0xFFFF).to(tl.uint32)).to(tl.int32)
    least = ((line >> 16) + rise) >> 6
    return least + (bits > looked_up(maps_ptr, LINES + 1, least)).to(tl.int32)
