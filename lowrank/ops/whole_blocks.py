"""Whole blocks of a decoder, for the newest position of each text: the structs, and the call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from . import native
from .newest import Newest

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # enum lowrank_activation


class Norm(ctypes.Structure):
    """struct lowrank_norm."""

    _fields_ = [("weight", c_void_p), ("dtype", c_int32), ("plus_one", c_int32), ("eps", c_float)]


class Block(ctypes.Structure):
    """struct lowrank_block."""

    _fields_ = [
        *((name, Norm) for name in ("attention_norm", "q_norm", "k_norm", "attention_out_norm")),
        *((name, Norm) for name in ("mlp_norm", "mlp_out_norm")),
        ("heads", native.Product * 3),
        ("out", native.Product),
        ("inner", native.Product * 2),
        ("down", native.Product),
        *((name, c_int32) for name in ("heads_count", "inner_count")),
        ("query_heads", c_int64),
        *((name, c_float) for name in ("scale", "softcap")),
        ("activation", c_int32),
    ]


def run(
    blocks: ctypes.Array[Block],
    newest: Sequence[Newest],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    x: Tensor,
) -> bool:
    """x [B, 1, H] through all blocks, in place, each over its own of what else is given.

    False, and nothing done, where keys or values are not what `newest` was made for.
    """
    dtype, count = x.dtype, len(blocks)
    for one, k, v in zip(newest, keys, values, strict=True):
        if not (one.is_over(k, dtype) and one.is_over(v, dtype)):
            return False
    pointers = c_void_p * count
    status = native.load_cpu().lowrank_blocks(
        blocks, count, pointers(*[one.address for one in newest]),
        pointers(*map(Tensor.data_ptr, keys)), pointers(*map(Tensor.data_ptr, values)),
        x.data_ptr(), native.DTYPES[dtype], x.shape[-1], torch.get_num_threads(),
    )  # fmt: skip
    native.check(status, "blocks")
    return True
