"""Launches the kernels of LoRA's branch, for one adapter or for rows grouped by theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lowrank.kernels import lora_configs
from lowrank.kernels.lora_linear import lora_expand_kernel, lora_shrink_kernel
from lowrank.kernels.lora_linear_backward import lora_dx_kernel, lora_dy_kernel, lora_sum_kernel
from lowrank.ops.reference.philox import threshold

from .launch import dot_dtype, dot_precision, on


class Adapters(NamedTuple):
    """The adapters of a call, contiguous, and their dropout, as the kernels take them."""

    A: Tensor  # [E, R, K]
    B: Tensor  # [E, N, R]
    scale: float
    order: Tensor | None
    offsets: Tensor | None
    seed: Tensor | None
    least_kept: int  # less 2^31: see lora_tile.kept
    keep_scale: float  # 1 / (1 - p)

    def tiles(self, M: int, rows: int) -> int:
        """How many tiles of `rows` rows hold all rows of all adapters: see lora_tile.segment."""
        E = self.A.shape[0]
        return triton.cdiv(M, rows) if self.order is None else M // rows + E + 1

    def config(self, tile: Callable[..., dict], shape: tuple, dtype: torch.dtype) -> dict:
        """What `tile`, of `configs`, says for this shape and dtype, and how float32
        operands are multiplied.
        """
        E, R, _ = self.A.shape
        return tile(*shape, E, R, dtype == torch.float32) | {"PRECISION": dot_precision(dtype)}

    def dot(self, x: Tensor) -> dict:
        """What x and A, or dy and B, are multiplied in: their dtype if they share it."""
        return {"DOT": dot_dtype(x.dtype if x.dtype == self.A.dtype else torch.float32)}


def adapters(
    A: Tensor,
    B: Tensor,
    scale: float,
    order: Tensor | None,
    offsets: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> Adapters:
    if order is not None and offsets is not None:
        order, offsets = order.contiguous(), offsets.contiguous()
    least_kept, keep_scale = threshold(p) - 2**31, 1 / (1 - p)
    A, B = A.contiguous(), B.contiguous()
    return Adapters(A, B, scale, order, offsets, seed, least_kept, keep_scale)


def shrink(x: Tensor, given: Adapters) -> tuple[Tensor, Tensor]:
    """h = drop(x) Aᵀ [M, R], for x [M, K], and the float32 [parts, M, R] that sum to it.

    Whoever reads more than one part is to write h.
    """
    parts = _shrink(x, given.A, given, False, given.seed, given.keep_scale)
    if len(parts) == 1:
        return parts[0], parts
    h = torch.empty_like(parts[0])
    if lora_configs.adds_parts(len(parts), *h.shape):
        return h, parts
    return _sum(parts, h), h[None]


def expand(
    h: Tensor,
    parts: Tensor,
    y: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    given: Adapters,
) -> None:
    """Writes y [M, N] = scale h Bᵀ + bias, and h; `dtype` is that of x, and y may be float32."""
    M, N = y.shape
    config = given.config(lora_configs.expand, y.shape, dtype)
    grid = (given.tiles(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"]))
    bias = None if bias is None else bias.contiguous()
    with on(y.device):
        lora_expand_kernel[grid](
            parts, given.B, bias, h, y, given.order, given.offsets,
            M, N, len(given.B), given.scale, PARTS=len(parts), **config,
        )  # fmt: skip


def g_and_dB(
    dy: Tensor, h: Tensor | None, needs_g: bool, given: Adapters
) -> tuple[Tensor | None, Tensor]:
    """g = scale dy B [M, R] and dB = scale dyᵀ h [E, N, R], for dy [M, N]; no dB without h."""
    M, N = dy.shape
    E, _, R = given.B.shape
    in_one_pass = needs_g and R <= lora_configs.MOST_RANKS_IN_ONE_PASS
    g = None
    if needs_g and not in_one_pass:
        g_parts = _shrink(dy, given.B, given, True, None, given.scale)
        g = g_parts[0] if len(g_parts) == 1 else _sum(g_parts, torch.empty_like(g_parts[0]))
    if h is None and not in_one_pass:
        return g, given.B.new_empty(0)
    config = given.config(lora_configs.dy, dy.shape, dy.dtype)
    blocks, rank_blocks = triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(R, config["BLOCK_R"])
    chunk = lora_configs.chunk(M, E, blocks * rank_blocks, config["BLOCK_M"])
    chunks = given.tiles(M, chunk)
    float32 = {"dtype": torch.float32, "device": dy.device}
    g_parts = torch.empty(blocks, M, R, **float32) if in_one_pass else None
    dB_parts = None if h is None else torch.empty(chunks, N, R, **float32)
    with on(dy.device):
        lora_dy_kernel[(blocks, chunks, rank_blocks)](
            dy, given.B, None if h is None else h.contiguous(), g_parts, dB_parts,
            given.order, given.offsets, M, N, E, dy.stride(0), CHUNK=chunk,
            **given.dot(dy), **config,
        )  # fmt: skip
    if g_parts is not None:
        g = _sum(g_parts, torch.empty(M, R, **float32), scale=given.scale)
    if dB_parts is None:
        return g, given.B.new_empty(0)
    return g, _sum(dB_parts, torch.empty_like(given.B), given.offsets, chunk, given.scale)


def dx_and_dA(
    x: Tensor | None, g: Tensor, dx: Tensor | None, dtype: torch.dtype, given: Adapters
) -> Tensor:
    """Writes the branch's dx = drop(g A) [M, K] where there is dx; dA = gᵀ drop(x) [E, R, K].

    No dA without x [M, K]. `dtype` is that of x; dx may be float32.
    """
    E, R, K = given.A.shape
    M = len(g)
    config = given.config(lora_configs.dx, (M,), dtype)
    blocks, rank_blocks = triton.cdiv(K, config["BLOCK_K"]), triton.cdiv(R, config["BLOCK_R"])

    def launch(x: Tensor | None, dx: Tensor | None, dA_parts: Tensor | None, blocks_z: int) -> None:
        with on(g.device):
            lora_dx_kernel[(blocks, chunks, blocks_z)](
                x, g, given.A, dx, dA_parts, given.order, given.offsets, given.seed,
                M, K, E, 0 if x is None else x.stride(0), given.least_kept,
                given.keep_scale, CHUNK=chunk, **config,
            )  # fmt: skip

    chunk = lora_configs.chunk(M, E, blocks * rank_blocks, config["BLOCK_M"])
    chunks = given.tiles(M, chunk)
    if x is None:
        launch(None, dx, None, 1)
        return given.A.new_empty(0)
    dA_parts = torch.empty(chunks, R, K, dtype=torch.float32, device=g.device)
    if rank_blocks == 1:
        launch(x, dx, dA_parts, 1)
    else:
        launch(x, None, dA_parts, rank_blocks)
        if dx is not None:
            launch(None, dx, None, 1)
    return _sum(dA_parts, torch.empty_like(given.A), given.offsets, chunk)


def _shrink(
    x: Tensor,
    weight: Tensor,
    given: Adapters,
    rank_last: bool,
    seed: Tensor | None,
    factor: float,
) -> Tensor:
    M, K = x.shape
    R = given.A.shape[1]
    config = given.config(lora_configs.shrink, x.shape, x.dtype)
    parts, part = lora_configs.shrink_parts(M, K, config["BLOCK_M"], config["BLOCK_K"])
    out = torch.empty(parts, M, R, dtype=torch.float32, device=x.device)
    grid = (given.tiles(M, config["BLOCK_M"]), triton.cdiv(R, config["BLOCK_R"]), parts)
    with on(x.device):
        lora_shrink_kernel[grid](
            x, weight, out, given.order, given.offsets, seed,
            M, K, len(weight), x.stride(0), given.least_kept, factor,
            RANK_LAST=rank_last, PART=part, **given.dot(x), **config,
        )  # fmt: skip
    return out


def _sum(
    parts: Tensor,
    out: Tensor,
    offsets: Tensor | None = None,
    chunk: int = 1,
    scale: float = 1.0,
) -> Tensor:
    """out = scale times the sum of all parts; with offsets, out[e] of those of adapter e."""
    size = parts[0].numel()
    with on(out.device):
        grid = (triton.cdiv(size, lora_configs.SUM["BLOCK"]), out.numel() // size)
        lora_sum_kernel[grid](
            parts, out, offsets, len(parts), size, chunk, scale, **lora_configs.SUM
        )
    return out
