"""Launches the Triton kernels; the meaning of the operators is in `reference`.

On a CPU these run only under Triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

from __future__ import annotations

import torch

from .codebook import codebook_dequantize as codebook_dequantize
from .codebook import codebook_linear as codebook_linear
from .codebook import codebook_linear_dx as codebook_linear_dx
from .codebook import codebook_quantize as codebook_quantize
from .launch import INTERPRETED

_OLDEST = (7, 5)  # Turing: what Triton compiles for


def missing() -> str | None:
    """Why Triton cannot run here at all, or None if it can."""
    usable = INTERPRETED or torch.cuda.is_available()
    return None if usable else "torch finds no CUDA device"


def refuse(op: str, *args) -> str | None:
    """Why Triton will not run `op` on these arguments, or None if it will."""
    device = args[0].device
    if device.type != "cuda":
        return None if INTERPRETED else f"runs on CUDA tensors; got one on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"needs compute capability {_OLDEST} or newer; {device} has {capability}"
    return None
