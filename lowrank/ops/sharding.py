"""How the operators of a linear layer compute on DTensors: which cuts of x, W, A, B go together.

A weight [N, K] is cut by rows (N) or by columns (K), on borders of blocks, an adapter with it:

    rows      x whole, B by N:  y, dB cut by N; what is summed over N, dx and dA, is Partial
    columns   x cut, A by K:    y, h are Partial; dx, dA cut by K

Imported for its effect, and after torch.distributed.tensor: nn.parallel does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

Placements = list[Placement | None]
Way = tuple[Placements, Placements]  # of the outputs, of the inputs; None for what is no tensor

_WHOLE, _ROWS, _COLUMNS = Replicate(), Shard(0), Shard(1)
_NOTHING: Placements = [None]


def _weight(
    cut: Placement, packed: Any, absmax: Any, absmax_scale: Any, codebook: Any
) -> Placements:
    """Of the weight's four tensors; absent ones have none."""
    table = cut if codebook is not None and codebook.shape[0] > 1 else _WHOLE
    if cut != _ROWS:  # each row's own step, offset and table are for all of its columns
        table = _WHOLE
    scale = cut if cut == _ROWS else _WHOLE
    wanted = (cut, cut, scale, table)
    given = (packed, absmax, absmax_scale, codebook)
    return [None if t is None else place for t, place in zip(given, wanted, strict=True)]


def _if(tensor: Any, place: Placement) -> Placements:
    return [None if tensor is None else place]


def _linear(x, packed, absmax, absmax_scale, codebook, bias, block_size) -> list[Way]:
    weight, last = (packed, absmax, absmax_scale, codebook), Shard(x.ndim - 1)
    return [
        ([y], [of_x, *_weight(cut, *weight), *_if(bias, of_bias), None])
        for y, of_x, cut, of_bias in (
            (_WHOLE, _WHOLE, _WHOLE, _WHOLE),
            (last, _WHOLE, _ROWS, _ROWS),
            (Partial(), last, _COLUMNS, Partial()),
        )
    ]


def _linear_dx(dy, packed, absmax, absmax_scale, codebook, K, block_size) -> list[Way]:
    weight, last = (packed, absmax, absmax_scale, codebook), Shard(dy.ndim - 1)
    return [
        ([dx], [of_dy, *_weight(cut, *weight), None, None])
        for dx, of_dy, cut in (
            (_WHOLE, _WHOLE, _WHOLE),
            (Partial(), last, _ROWS),
            (last, _WHOLE, _COLUMNS),
        )
    ]


def _dequantize(packed, absmax, absmax_scale, codebook, K, block_size, dtype) -> list[Way]:
    return [
        ([cut], [*_weight(cut, packed, absmax, absmax_scale, codebook), None, None, None])
        for cut in (_WHOLE, _ROWS, _COLUMNS)
    ]


def _lora(
    x, weight, absmax, absmax_scale, codebook, bias, block_size, A, B, scale, order, offsets, p,
    seed,
) -> list[Way]:  # fmt: skip
    base, last = (weight, absmax, absmax_scale, codebook), Shard(x.ndim - 1)
    rest = [None, *_if(order, _WHOLE), *_if(offsets, _WHOLE), None, *_if(seed, _WHOLE)]
    return [
        ([y, h], [of_x, *_weight(cut, *base), *_if(bias, of_bias), None, of_A, of_B, *rest])
        for y, h, of_x, cut, of_bias, of_A, of_B in (
            (_WHOLE, _WHOLE, _WHOLE, _WHOLE, _WHOLE, _WHOLE, _WHOLE),
            (last, _WHOLE, _WHOLE, _ROWS, _ROWS, _WHOLE, Shard(1)),
            (Partial(), Partial(), last, _COLUMNS, Partial(), Shard(2), _WHOLE),
        )
    ]


def _lora_backward(
    dy, x, h, weight, absmax, absmax_scale, codebook, block_size, A, B, scale, order, offsets, p,
    seed, needs,
) -> list[Way]:  # fmt: skip
    base, last = (weight, absmax, absmax_scale, codebook), Shard(dy.ndim - 1)
    rest = [None, *_if(order, _WHOLE), *_if(offsets, _WHOLE), None, *_if(seed, _WHOLE), None]
    ways = []
    for grads, of_dy, of_x, cut, of_A, of_B in (
        ((_WHOLE, _WHOLE, _WHOLE), _WHOLE, _WHOLE, _WHOLE, _WHOLE, _WHOLE),
        ((Partial(), Partial(), Shard(1)), last, _WHOLE, _ROWS, _WHOLE, Shard(1)),
        ((last, Shard(2), _WHOLE), _WHOLE, last, _COLUMNS, Shard(2), _WHOLE),
    ):
        outputs = [g if needed else _WHOLE for g, needed in zip(grads, needs, strict=True)]
        of_x = of_x if needs[1] else _WHOLE  # else it is empty
        inputs = [of_dy, of_x, _WHOLE, *_weight(cut, *base), None, of_A, of_B, *rest]
        ways.append((outputs, inputs))
    return ways


for _name, _ways in {
    "codebook_linear": _linear,
    "codebook_linear_dx": _linear_dx,
    "codebook_dequantize": _dequantize,
    "lora_linear": _lora,
    "lora_linear_backward": _lora_backward,
}.items():
    register_sharding(getattr(torch.ops.lowrank, _name).default)(_ways)
