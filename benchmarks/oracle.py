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
    full = columns // block_size  # in place, block by block: a large weight is 2 GB in float64
    values[:, : full * block_size].unflatten(1, (full, block_size)).mul_(scales[:, :full, None])
    values[:, full * block_size :].mul_(scales[:, full:])
    return values


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
    values = _look_up(_nibbles(packed.reshape(1, -1)), code.double()[None])[0, : shape.numel()]
    whole = values.numel() // block_size  # the last block may be short
    values[: whole * block_size].view(-1, block_size).mul_(scales[:whole, None])
    values[whole * block_size :].mul_(scales[whole:])
    return values.reshape(shape)


def decode_torchao(
    packed: Tensor,
    scales: Tensor,
    factor: Tensor,
    mean: Tensor,
    code: Tensor,
    shape: torch.Size,
    block_size: int,
    group: int,
) -> Tensor:
    """The same of torchao's: scale[b] = scales[b] / factor[b // group] + mean, over the flattened
    weight.
    """
    absmax = scales.double() / factor.double().repeat_interleave(group) + mean.double()
    values = _look_up(_nibbles(packed.reshape(1, -1)), code.double()[None])
    return values.view(-1, block_size).mul_(absmax[:, None]).reshape(shape)


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, bytes] -> codes [N, 2 bytes]: the high nibble is the even element."""
    return torch.stack([packed >> 4, packed & 0xF], dim=-1).flatten(1)


def _look_up(codes: Tensor, codebook: Tensor) -> Tensor:
    if codebook.shape[0] == 1:
        return codebook[0].index_select(0, codes.reshape(-1).int()).view(codes.shape)
    return torch.gather(codebook, 1, codes.long())
