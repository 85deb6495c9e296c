"""What stored 4-bit weights stand for, decoded in float64 from the format alone."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_lowrank(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    columns: int,
    block_size: int,
) -> Tensor:
    """w[n, k] = codebook[code[n, k]] * absmax[n, k // G] of lowrank's row-wise layout, float64 [N,
    K].
    """
    scales = absmax.double()  # [N, blocks]
    if absmax_scale is not None:
        step, offset = absmax_scale.double().split(1, dim=1)  # [N, 1] each
        scales = scales * step + offset
    values = _look_up(_nibbles(packed)[:, :columns], codebook.double())
    return values * scales.repeat_interleave(block_size, dim=1)[:, :columns]


def decode_bitsandbytes(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor,
    nested_map: Tensor,
    offset: Tensor,
    code: Tensor,
    shape: torch.Size,
    block_size: int,
    nested_block_size: int,
) -> Tensor:
    """The same of bitsandbytes' double-quantized layout, whose blocks run over the flattened
    weight.
    """
    nested = nested_absmax.double().repeat_interleave(nested_block_size)[: absmax.numel()]
    scales = nested_map.double()[absmax.long()] * nested + offset.double()
    values = code.double()[_nibbles(packed.reshape(1, -1)).long()].reshape(-1)[: shape.numel()]
    return (values * scales.repeat_interleave(block_size)[: values.numel()]).reshape(shape)


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, bytes] -> codes [N, 2 bytes]: the high nibble is the even element."""
    return torch.stack([packed >> 4, packed & 0xF], dim=-1).flatten(1)


def _look_up(codes: Tensor, codebook: Tensor) -> Tensor:
    if codebook.shape[0] == 1:
        return codebook[0][codes.long()]
    return torch.gather(codebook, 1, codes.long())
