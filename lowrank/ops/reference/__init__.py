"""What each operator means, in plain PyTorch. Also the fallback where no kernel runs.

Weights are decoded a panel of rows at a time, so no path holds a whole dense weight that the caller
did not ask for. Products are formed in float32 (float64 if the activations are) whatever the dtype.
"""

from __future__ import annotations

from .adamw8bit import adamw8bit_step as adamw8bit_step
from .codebook import codebook_dequantize as codebook_dequantize
from .codebook import codebook_linear as codebook_linear
from .codebook import codebook_linear_dx as codebook_linear_dx
from .codebook import codebook_quantize as codebook_quantize
from .cross_entropy import labelled_rows as labelled_rows
from .cross_entropy import linear_cross_entropy as linear_cross_entropy
from .cross_entropy import logits_of as logits_of
from .cross_entropy import times_weight as times_weight
from .elementwise import ACTIVATIONS as ACTIVATIONS
from .elementwise import gated as gated
from .elementwise import gated_backward as gated_backward
from .elementwise import rms_norm as rms_norm
from .elementwise import rms_norm_backward as rms_norm_backward
from .elementwise import rotate as rotate
from .lion8bit import lion8bit_step as lion8bit_step
from .lora import adapter_bounds as adapter_bounds
from .lora import lora_linear as lora_linear
from .lora import lora_linear_backward as lora_linear_backward
from .philox import threshold as threshold


def missing() -> None:
    """Nothing: the reference needs only torch."""


def refuse(op: str, *args) -> str | None:
    """The reference runs everything, on every device."""
    return None
