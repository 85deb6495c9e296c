"""What the LoRA kernels share: which rows a program has, what dropout keeps, h times a tile of B.

Rows of several adapters come grouped: those of adapter e are order[offsets[e] : offsets[e + 1]],
and what stands before offsets[0] has none. Tiles of T rows never straddle two adapters: with `low`
the first place of a segment and s its number (0: no adapter, e + 1: adapter e), its tiles begin at
program low // T + s. That leaves each segment room for its ceil(count / T) tiles, since
(low + count) // T - low // T + 1 is at least that, and M // T + E + 1 programs hold all of them:
found on the device from `offsets` alone, with no sum over the segments before, and no sync.
"""

import triton
import triton.language as tl


@triton.jit
def segment(offsets_ptr, t, M, E, T, BLOCK_E: tl.constexpr):
    """(adapter or -1, first, last): the places of tile `t` of T rows, none where first >= last."""
    if offsets_ptr is None:
        adapter, first, end = t * 0, t * T, M
    else:
        e = tl.arange(0, BLOCK_E)
        starts = tl.load(offsets_ptr + e, mask=e < E, other=0) // T + e + 1
        adapter = tl.sum(((starts <= t) & (e < E)).to(tl.int32)) - 1
        low = tl.where(adapter < 0, 0, tl.load(offsets_ptr + tl.maximum(adapter, 0)))
        first = low + (t - low // T - adapter - 1) * T
        end = tl.load(offsets_ptr + adapter + 1)
    return adapter, first, tl.minimum(first + T, end)


@triton.jit
def rows_at(order_ptr, place, last):
    """The rows of x, int64, that stand at these places."""
    inside = place < last
    row = place if order_ptr is None else tl.load(order_ptr + place, mask=inside, other=0)
    return row.to(tl.int64)


@triton.jit
def kept(seed_ptr, row, k0, K, least_kept, BLOCK_K: tl.constexpr):
    """Whether dropout keeps x[row, k] for k from k0, a multiple of 4: [rows, BLOCK_K].

    One Philox-4x32 of 7 rounds for four neighbours, at counter row * ceil(K / 4) + k // 4: a
    function of the element alone, whatever the tile. A word is kept if it is at least p * 2^32;
    both come less 2^31 here, so that a signed comparison orders them.
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
    """
    at = row[:, None] * ((K + 3) // 4) + (k0 // 4 + tl.arange(0, BLOCK_K // 4))[None, :]
    low = at.to(tl.uint32)
    zero = low * 0
    u0, u1, u2, u3 = tl.philox(
        tl.load(seed_ptr), low, (at >> 32).to(tl.uint32), zero, zero, n_rounds=7
    )
    quads = tl.join(
        tl.join(_at_least(u0, least_kept), _at_least(u2, least_kept)),
        tl.join(_at_least(u1, least_kept), _at_least(u3, least_kept)),
    )  # [rows, BLOCK_K / 4, 2, 2]
    return tl.reshape(quads, [row.shape[0], BLOCK_K])


@triton.jit
def product(a, b, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, in float32, of operands in the dtype that tensor cores take them in."""
    return tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION)


@triton.jit
def rank_tile(h_ptr, row, inside, r0, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """These rows of h or g, and ranks from r0: float32 [rows, BLOCK_R]."""
    r = r0 + tl.arange(0, BLOCK_R)
    inside = inside[:, None] & (r < R)[None, :]
    return tl.load(h_ptr + row[:, None] * R + r[None, :], mask=inside, other=0.0)


@triton.jit
def summed_h(
    parts_ptr, row, inside, r0, M, R: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr
):
    """As `rank_tile`, of h that is the sum of PARTS parts, added in their order."""
    h = rank_tile(parts_ptr, row, inside, r0, R, BLOCK_R)
    for part in tl.static_range(1, PARTS):
        part_ptr = parts_ptr + tl.cast(M, tl.int64) * (part * R)
        h += rank_tile(part_ptr, row, inside, r0, R, BLOCK_R)
    return h


@triton.jit
def b_tile(b_ptr, n, inside, r0, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """B [N, R] for these columns of y, and ranks from r0: [BLOCK_R, columns]."""
    r = r0 + tl.arange(0, BLOCK_R)
    at = n.to(tl.int64)[None, :] * R + r[:, None]
    return tl.load(b_ptr + at, mask=inside[None, :] & (r < R)[:, None], other=0.0)


@triton.jit
def branch(
    parts_ptr,  # float32 [PARTS, M, R]
    b_ptr,  # [N, R]
    h_ptr,  # float32 [M, R]
    row,
    inside_m,
    n,
    inside_n,
    stores,  # whether this program writes h
    M,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h Bᵀ for these rows and columns, float32; h, where it came in parts, is stored."""
    acc = tl.zeros([row.shape[0], n.shape[0]], tl.float32)
    for r0 in range(0, R, BLOCK_R):
        h = summed_h(parts_ptr, row, inside_m, r0, M, R, PARTS, BLOCK_R)
        acc = product(h, b_tile(b_ptr, n, inside_n, r0, R, BLOCK_R), acc, tl.float32, PRECISION)
        if PARTS > 1:
            r = r0 + tl.arange(0, BLOCK_R)
            inside = inside_m[:, None] & (r < R)[None, :] & stores
            tl.store(h_ptr + row[:, None] * R + r[None, :], h, mask=inside)
    return acc


@triton.jit
def _at_least(u, least):
    return (u ^ 0x80000000).to(tl.int32, bitcast=True) >= least
