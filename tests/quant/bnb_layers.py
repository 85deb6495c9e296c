"""Layers as bitsandbytes writes them, and the weights that it computes with."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
F = bnb.functional

STATE = "weight.quant_state.bitsandbytes__"


def layer_tensors(
    weight: Tensor,
    kind: str = "nf4",
    nested: bool = True,
    block_size: int = 64,
    storage: torch.dtype = torch.uint8,
) -> tuple[dict[str, Tensor], Tensor]:
    """The state dict that bitsandbytes writes for this weight, and the weight it computes with."""
    packed, state = F.quantize_4bit(
        weight,
        blocksize=block_size,
        quant_type=kind,
        compress_statistics=nested,
        quant_storage=storage,
    )
    tensors = {"weight": packed}
    tensors |= {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    return tensors, dequantized(tensors)


def dequantized(tensors: dict[str, Tensor]) -> Tensor:
    """The weight of a layer's tensors, by bitsandbytes, in the dtype that they name.

    As one row: of rows that are no number of whole blocks, its kernel for AVX-512 takes the scales
    of others. In eager mode: its torch code compiles itself otherwise.
    """
    stats = {k.removeprefix("weight."): v for k, v in tensors.items() if k != "weight"}
    state = F.QuantState.from_dict(stats, device=torch.device("cpu"))
    shape, state.shape = state.shape, torch.Size([1, math.prod(state.shape)])
    with torch.compiler.set_stance("force_eager"):
        dense = F.dequantize_4bit(tensors["weight"], state)
    return dense.reshape(shape)


def fields(tensors: dict[str, Tensor]) -> dict:
    """The JSON of a layer's quant_state."""
    return json.loads(bytes(tensors[state_key(tensors)].tolist()))


def edited(tensors: dict[str, Tensor], **changes: object) -> dict[str, Tensor]:
    """The layer with these fields of its quant_state; None takes one out."""
    state = {k: v for k, v in (fields(tensors) | changes).items() if v is not None}
    return tensors | {state_key(tensors): as_bytes(json.dumps(state))}


def as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def state_key(tensors: dict[str, Tensor]) -> str:
    return next(k for k in tensors if k.startswith(STATE))


def same_weights(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits, but for the sign of 0: bitsandbytes' CPU kernels differ there.

    Code 8 of fp4 is 0.0 in its table and in AVX-512, -0.0 in plain C++.
    """
    return a.dtype == b.dtype and torch.equal(a, b)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bytes: -0.0 is not 0.0."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )
