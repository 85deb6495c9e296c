"""A quantized weight moved to a new one near it, scales and codes refitted in turn."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowrank.errors import ShapeError

from . import double_quant as scales
from .blocks import join, pack, panels, split, unpack
from .registry import Quantizer
from .storage import Storage

_STEPS = 4


@torch.no_grad()
def refit(quantizer: Quantizer, storage: Storage, weight: Tensor) -> Storage:
    """The Storage nearest to `weight` [N, K] that the iteration from `storage` finds.

    For 16 values of a table t, alternately, in each block:  scale <- Σ t w / Σ t², the least
    squares of the codes there are, and codes <- those nearest to w / scale. A scale thus need not
    be that of the largest weight, and where nothing has changed nothing moves. Other schemes, and
    where it is nearer, quantize `weight` anew.
    """
    if tuple(weight.shape) != tuple(storage.shape):
        raise ShapeError(f"weight: expected {list(storage.shape)}; got {list(weight.shape)}")
    weight = weight.detach().float()
    best = [quantizer.quantize(weight), storage]
    if getattr(quantizer, "codebook_operands", None) is not None:
        best.append(_refit_codes(quantizer, storage, weight))
    errors = [(weight - quantizer.dequantize(s, torch.float32)).norm().item() for s in best]
    return replace(best[errors.index(min(errors))], dtype=storage.dtype)


def _refit_codes(quantizer: Quantizer, storage: Storage, weight: Tensor) -> Storage:
    packed, absmax, absmax_scale, codebook, block_size = quantizer.codebook_operands(storage)
    N, K = storage.shape
    absmax = absmax if absmax_scale is None else scales.expand(absmax, absmax_scale)
    entries, order = codebook.sort(dim=-1, stable=True)
    rank = order.argsort(dim=-1)  # of each code among the sorted entries
    tensors = {name: tensor.clone() for name, tensor in storage.tensors.items()}
    for start, stop in panels(N, K, weight.device):
        rows = slice(start, stop) if codebook.shape[0] == N else slice(0, 1)
        target = split(weight[start:stop], block_size)
        table = entries[rows].expand(stop - start, 16)
        ranks = rank[rows].expand(stop - start, 16).gather(1, unpack(packed[start:stop], K).long())
        scale = absmax[start:stop].clone()
        for _ in range(_STEPS):
            values = split(table.gather(1, ranks), block_size)
            norm = values.square().sum(-1)
            best = (values * target).sum(-1) / torch.where(norm > 0, norm, 1)
            scale = torch.where(best * scale > 0, best, scale)
            ranks = _nearest(target, scale, table, K)
        if absmax_scale is None:
            tensors["absmax"][start:stop] = scale
        else:
            held = scales.compress(scale)
            tensors["absmax"][start:stop], tensors["absmax_scale"][start:stop] = held
            ranks = _nearest(target, scales.expand(*held), table, K)  # as they will be read
        codes = order[rows].expand(stop - start, 16).gather(1, ranks)
        tensors["packed"][start:stop] = pack(codes.to(torch.uint8))
    return replace(storage, tensors=tensors)


def _nearest(target: Tensor, scale: Tensor, table: Tensor, K: int) -> Tensor:
    """int64 [n, K]: places in the ascending table [n, 16] of what is nearest to each weight."""
    scaled = join(target / torch.where(scale == 0, 1, scale)[..., None], K)
    mids = (table[:, :-1] + table[:, 1:]) / 2
    return torch.searchsorted(mids.contiguous(), scaled.contiguous())
