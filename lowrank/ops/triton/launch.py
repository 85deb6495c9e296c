"""What every launch needs: the device, contiguous rows, and what tensor cores multiply."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret

DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def as_rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] with consecutive elements in a row."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The interpreter multiplies the bits of bfloat16 as if they were integers."""
    return tl.float32 if INTERPRETED else DOT[dtype]


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied beside activations of `dtype`.

    TF32 rounds them to 11 bits, as many as float16 has and three more than bfloat16.
    """
    return "ieee" if dtype == torch.float32 else "tf32"


def on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
