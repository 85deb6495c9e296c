"""What every backend of an 8-bit optimizer needs: the maps of its codes, the layout, the numbers.

A moment is code and scale, value = map[code] * scale, one float32 scale for each 256 elements of a
row. A parameter [N, ...] is N rows of all that follows; one of one dimension, or none, is a single
row. Blocks never cross rows: any slice of rows is a valid state, so sharded checkpoints load on any
number of ranks. The price is for short rows, 8 / C bytes a parameter for C < 256 columns: a LoRA B
of rank 16 takes 2.5 bytes a parameter where 2.03 is the least.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
LOWEST = 0x34800000  # the bits of 2^-22: no midpoint between codes is below it
HIGHEST = 0x3F800000  # of 1
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ZERO_OF_M, ZERO_OF_V = 127, 0  # the codes of 0


@cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 ascending float32 values of the codes of the first (signed) and the second moment.

    Seven decades from 1e-6 to 1; decade i has 2^i (signed) or 2^(i+1) values, at the middles of as
    many equal parts of [0.1, 1], negative ones too if signed; and 0 and 1. These are the bits of
    bitsandbytes' table.   Dettmers et al., arXiv:2110.02861, §2.1.
    """
    parts = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for decade in range(7):
        count = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        parts += [middles, -middles] if signed else [middles]
    return torch.cat(parts).sort().values


def lines_and_mids(entries: Tensor) -> tuple[Tensor, Tensor]:
    """(lines, mids), int32 [256] each: the nearest of ascending entries to s in two look-ups.

    mids are the bits of the midpoints, rounded down: what is above one is above the other. In an
    eighth of an octave they are nearly equally spaced, so their number below s is nearly a line:
    of those that are less than 1 above it and not below, the one with the most to spare. With b
    the bits of s, held to LOWEST and HIGHEST, and line = lines[(b - LOWEST) >> 20]:
        low = ((line >> 16) + ((b & 0xFFFFF) * (line & 0xFFFF) >> 20)) >> 6
        midpoints below s = low + (b > mids[low])
    """
    exact = (entries[:-1].double() + entries[1:].double()) / 2
    mids = exact.float()
    lower = torch.nextafter(mids, torch.zeros_like(mids))
    mids = torch.where(mids.double() > exact, lower, mids).view(torch.int32)
    rises = torch.arange(1024, dtype=torch.float64, device="cpu")[:, None]  # in 64ths
    lines = mids.new_zeros(256)
    for i, start in enumerate(range(LOWEST, HIGHEST + 1, 1 << 20)):
        first, inside = int((mids < start).sum()), (mids >= start) & (mids < start + (1 << 20))
        count = int(inside.sum())
        x = rises.new_tensor([0, *(mids[inside] - start).tolist(), 1 << 20]) / (1 << 20)
        least = rises.new_tensor([-1, *range(count), count - 1]) - rises / 64 * x
        most = rises.new_tensor([1, *range(1, count + 1), count + 1]) - rises / 64 * x
        least, most = least.amax(1), most.amin(1)
        best = (most - least).argmax()
        height = first + (most + least)[best] / 2
        lines[i] = int(height * 64) << 16 | int(best)
    return lines, torch.cat([mids, mids.new_full((256 - len(mids),), 2**31 - 1)])


def rows_and_columns(shape: torch.Size) -> tuple[int, int]:
    """How a parameter of this shape is laid out in rows."""
    if len(shape) < 2:
        return 1, shape.numel()
    return shape[0], shape[1:].numel()


def scale_shape(shape: torch.Size) -> tuple[int, int]:
    """The shape of the scales of a moment of this shape: [N, ceil(C / 256)]."""
    rows, columns = rows_and_columns(shape)
    return rows, -(-columns // BLOCK)


def misfit(params: list[Tensor], grads: list[Tensor], *state: list[Tensor]) -> str | None:
    """Why kernels that take addresses cannot take these, or None if they can.

    `state` is m and m_scale, or m, m_scale, v and v_scale.
    """
    if len({len(tensors) for tensors in (params, grads, *state)}) > 1:
        return "the lists are not of one length"
    for p, g, *own in zip(params, grads, *state, strict=True):
        shape, blocks = p.shape, scale_shape(p.shape)
        if g.shape != shape or g.dtype != p.dtype:
            return "a gradient has not the shape and dtype of its parameter"
        if any(t.shape != shape or t.dtype != torch.uint8 for t in own[::2]):
            return "the codes of a moment are not uint8 in the shape of the parameter"
        if any(t.shape != blocks or t.dtype != torch.float32 for t in own[1::2]):
            return f"the scales of a moment are not float32 {list(blocks)}"
        if not (p.is_contiguous() and all(t.is_contiguous() for t in own)):
            return "a parameter or its state is not contiguous"
        if p.dtype not in _DTYPES:
            return f"{p.dtype} is not float32, float16 or bfloat16"
    return None


class Coefficients(NamedTuple):
    """The numbers of one step, in the order of the C struct; each is rounded to float32 where used.

    m = m * beta1 + g * rest1,  v = v * beta2 + (g * g) * rest2
    p = p * decay - (m / (sqrt(v) * root2 + eps)) * rate
    """

    beta1: float
    rest1: float
    beta2: float
    rest2: float
    decay: float
    rate: float
    root2: float
    eps: float


def coefficients(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> Coefficients:
    """For step 1, 2, ... of AdamW: bias corrections go into `rate` and `root2`."""
    return Coefficients(
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        1 - lr * weight_decay,
        lr / (1 - beta1**step),
        (1 - beta2**step) ** -0.5,
        eps,
    )
