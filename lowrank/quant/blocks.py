"""Blocks of a row that share a scale, and panels of rows that bound memory; none crosses a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lowrank.ops.checks import check_float

from .storage import Storage

# Weights handled at once. A GPU gets fewer, larger pieces: there a launch costs what a panel saves.
_PANEL = {"cpu": 1 << 20}
_PANEL_ELSEWHERE = 1 << 24


def panels(N: int, K: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows of each panel of an [N, K]: a few MB, or a row if that is more."""
    size = N * K if device.type == "meta" else _PANEL.get(device.type, _PANEL_ELSEWHERE)
    height = max(1, size // K)
    for start in range(0, N, height):
        yield start, min(start + height, N)


def by_panels(
    storage: Storage, dtype: torch.dtype, decode: Callable[[Storage, torch.dtype], Tensor]
) -> Tensor:
    """The weight [N, K] of a row-local scheme, its rows decoded a panel at a time. DtypeError."""
    check_float("dtype", dtype)
    N, K = storage.shape
    device = next(iter(storage.tensors.values())).device
    parts = list(panels(N, K, device))
    if len(parts) == 1:
        return decode(storage, dtype).contiguous()
    out = torch.empty(N, K, dtype=dtype, device=device)
    for start, stop in parts:
        out[start:stop] = decode(storage.rows(start, stop), dtype)
    return out


def split(rows: Tensor, block_size: int) -> Tensor:
    """rows [n, K] -> float32 blocks [n, ceil(K / G), min(G, K)], the last one filled with zeros.

    Contiguous, whatever the strides of the rows: torch's searches copy others, and warn of it.
    """
    width = min(block_size, rows.shape[1])
    missing = -rows.shape[1] % width
    padded = torch.nn.functional.pad(rows.float(), (0, missing))
    return padded.contiguous().unflatten(1, (-1, width))


def join(blocks: Tensor, K: int) -> Tensor:
    """The inverse of `split`: [n, K]."""
    return blocks.flatten(1)[:, :K]


def pack(codes: Tensor) -> Tensor:
    """Codes below 16, uint8 [n, K], two a byte [n, ceil(K / 32) * 16], the even in the high half.

    The layout of the codebook operators; the pad is zeros.
    """
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 32))
    return padded[:, 0::2] << 4 | padded[:, 1::2]


def unpack(packed: Tensor, K: int) -> Tensor:
    """The codes uint8 [n, K] of packed uint8 [n, ceil(K / 32) * 16]."""
    return torch.stack((packed >> 4, packed & 0xF), dim=-1).flatten(1)[:, :K]


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, uint8 [n, K] -> uint8 [n, bits, ceil(K / 8)].

    Bit k % 8 of byte k // 8 of plane p is bit p of code k: any number of bits is stored dense.
    """
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    groups = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8))
    planes = [((groups >> p & 1) << places).sum(-1, dtype=torch.uint8) for p in range(bits)]
    return torch.stack(planes, dim=1)


def unpack_planes(planes: Tensor, K: int) -> Tensor:
    """The codes uint8 [n, K] of planes uint8 [n, bits, ceil(K / 8)]."""
    places = torch.arange(8, dtype=torch.uint8, device=planes.device)
    codes = torch.zeros(planes.shape[0], K, dtype=torch.uint8, device=planes.device)
    for p, plane in enumerate(planes.unbind(1)):
        codes |= (plane[..., None] >> places & 1).flatten(1)[:, :K] << p
    return codes
