"""The tiles of the LoRA kernels, fixed as in `configs`: M rows, E adapters, R ranks."""

from __future__ import annotations

import triton

from lowrank.kernels.configs import tile_rows

# Products in float32 are sums of fused multiply-adds; said, since Triton's default will change.
FUSED = {"enable_fp_fusion": True}

# lora_sum_kernel: 8 parts on their way to each of 512 outputs.
SUM = {"BLOCK": 512, "UNROLL": 8} | FUSED

# Above, lora_dy_kernel's parts of g outweigh reading dy once more.
MOST_RANKS_IN_ONE_PASS = 32


def ranks(R: int, float32: bool, most: int = 64) -> dict:
    """The ranks that a LoRA kernel takes at once; in float32 a thread holds all it multiplies."""
    return {"R": R, "BLOCK_R": max(16, min(32 if float32 else most, triton.next_power_of_2(R)))}


def shrink(M: int, K: int, E: int, R: int, float32: bool) -> dict:
    """lora_shrink_kernel: a narrow tile, whose mask leaves room for several programs at once."""
    tile = _tile(M, E, R, float32) | ranks(R, float32, most=128)
    tile["BLOCK_K"] = 32 if float32 or R > 64 else _columns(K, 64)
    return tile | {"num_warps": 4, "num_stages": 3}


def shrink_parts(M: int, K: int, BLOCK_M: int, BLOCK_K: int) -> tuple[int, int]:
    """(parts, columns of a part): about 256 programs, two for each multiprocessor of a large GPU.

    At most 16 parts, a power of two: their number is compiled into what reads them.
    """
    parts = 1
    while 2 * parts <= min(16, 256 // triton.cdiv(M, BLOCK_M), K // BLOCK_K):
        parts *= 2
    return parts, triton.cdiv(triton.cdiv(K, parts), BLOCK_K) * BLOCK_K


def adds_parts(parts: int, M: int, R: int) -> bool:
    """Whether readers of h add its parts: where 64 values or fewer are all that a thread loads."""
    return parts * tile_rows(M) * max(16, min(64, triton.next_power_of_2(R))) <= 128 * 64


def expand(M: int, N: int, E: int, R: int, float32: bool) -> dict:
    """lora_expand_kernel."""
    tile = _tile(M, E, R, float32)
    tile["BLOCK_N"] = 64 if float32 or R > 64 else _columns(N, 128)
    return tile | {"num_warps": 4, "num_stages": 2 if float32 else 1}


def dy(M: int, N: int, E: int, R: int, float32: bool) -> dict:
    """lora_dy_kernel: the wider the block of columns, the fewer parts of g.

    Rows that are not aligned take an address an element: ptxas spilled with half the columns.
    """
    tile = _tile(M, E, R, float32) | ranks(R, float32, most=128)
    wide = 256 if R <= MOST_RANKS_IN_ONE_PASS else 128
    tile["BLOCK_N"] = 64 if float32 or R > 64 else wide if N % 16 == 0 else wide // 4
    return tile | {"num_warps": 8, "num_stages": 3 if R <= 64 else 2}


def dx(M: int, E: int, R: int, float32: bool) -> dict:
    """lora_dx_kernel: beyond the ranks of a block it runs once for dA and once for dx."""
    tile = _tile(M, E, R, float32)
    tile["BLOCK_K"] = 64 if float32 or R > 64 else 128
    return tile | {"num_warps": 8, "num_stages": 3 if float32 else 2}


def chunk(M: int, E: int, blocks: int, BLOCK_M: int) -> int:
    """Rows of a chunk, so that chunks x `blocks` of columns are about 256 programs.

    A power of two times BLOCK_M, since it is compiled in, and no more than an adapter's even share.
    """
    tiles = triton.cdiv(M, BLOCK_M)
    wanted = min(triton.cdiv(tiles, max(1, 256 // blocks)), triton.cdiv(tiles, E))
    return BLOCK_M * triton.next_power_of_2(wanted)


def _tile(M: int, E: int, R: int, float32: bool) -> dict:
    """Rows of a tile: those of an adapter, were they shared evenly. Then ranks and adapters."""
    rows = min(tile_rows(triton.cdiv(M, E)), 32 if float32 else 64)
    adapters = max(16, triton.next_power_of_2(E))
    return ranks(R, float32) | {"BLOCK_E": adapters, "BLOCK_M": rows} | FUSED


def _columns(C: int, most: int) -> int:
    """Columns of a tile: rows that are not aligned are loaded an element, and an address, each."""
    return most if C % 16 == 0 else most // 2
