"""Launches the Triton kernels; the meaning of the operators is in `reference`.

On a CPU these run only under Triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import adamw8bit, cross_entropy, lion8bit, lora
from .adamw8bit import adamw8bit_step as adamw8bit_step
from .codebook import codebook_dequantize as codebook_dequantize
from .codebook import codebook_linear as codebook_linear
from .codebook import codebook_linear_dx as codebook_linear_dx
from .codebook import codebook_quantize as codebook_quantize
from .cross_entropy import linear_cross_entropy as linear_cross_entropy
from .launch import INTERPRETED
from .lion8bit import lion8bit_step as lion8bit_step
from .lora import lora_linear as lora_linear
from .lora import lora_linear_backward as lora_linear_backward

_REFUSALS = adamw8bit.REFUSALS | lion8bit.REFUSALS | cross_entropy.REFUSALS | lora.REFUSALS

_OLDEST = (7, 5)  # Turing: what Triton compiles for


def missing() -> str | None:
    """Why Triton cannot run here at all, or None if it can."""
    usable = INTERPRETED or torch.cuda.is_available()
    return None if usable else "torch finds no CUDA device"


def refuse(op: str, *args) -> str | None:
    """Why Triton will not run `op` on these arguments, or None if it will."""
    first = args[0][:1] if isinstance(args[0], list) else args[:1]
    return next(filter(None, map(_refuse_device, first)), None) or (
        _REFUSALS[op](*args) if op in _REFUSALS else None
    )


def _refuse_device(tensor: Tensor) -> str | None:
    device = tensor.device
    if device.type != "cuda":
        return None if INTERPRETED else f"runs on CUDA tensors; got one on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"needs compute capability {_OLDEST} or newer; {device} has {capability}"
    return None
