"""The operators on a CPU, over the kernels of `csrc/`; their meaning is in `reference`.

Few rows of x are multiplied straight from packed codes, with AVX2 any number, with AVX-512 1023.
Else a panel of the weight's rows is decoded to float32 and given to the BLAS that torch brings. So
the dense weight never exists.
16-bit activations are computed in float32: on a CPU without 16-bit matrix units that is many times
faster, and the result is rounded once. Many rows of bfloat16 on a CPU with AMX or AVX512-BF16 are
multiplied in it: the weight is then rounded to bfloat16, as dequantize and F.linear have it.

`dispatch` calls `refuse` before an operator: what passes it is what the pointers need.
"""

from __future__ import annotations

from lowrank.ops import native

from . import adamw8bit, codebook, cross_entropy, elementwise, lion8bit, lora
from .adamw8bit import adamw8bit_step as adamw8bit_step
from .codebook import codebook_dequantize as codebook_dequantize
from .codebook import codebook_linear as codebook_linear
from .codebook import codebook_linear_dx as codebook_linear_dx
from .codebook import codebook_quantize as codebook_quantize
from .cross_entropy import linear_cross_entropy as linear_cross_entropy
from .elementwise import gated as gated
from .elementwise import gated_backward as gated_backward
from .elementwise import rms_norm as rms_norm
from .elementwise import rms_norm_backward as rms_norm_backward
from .elementwise import rotate as rotate
from .lion8bit import lion8bit_step as lion8bit_step
from .lora import lora_linear as lora_linear
from .lora import lora_linear_backward as lora_linear_backward

_REFUSALS = codebook.REFUSALS | cross_entropy.REFUSALS | lora.REFUSALS
_REFUSALS |= adamw8bit.REFUSALS | lion8bit.REFUSALS | elementwise.REFUSALS


def missing() -> str | None:
    """Why the native kernels cannot run here at all, or None if they can."""
    library = native.load_cpu()
    return library if isinstance(library, str) else None


def refuse(op: str, *args) -> str | None:
    """Why the native kernels do not run `op` on these arguments, or None if they do."""
    library = native.load_cpu()
    return library if isinstance(library, str) else _REFUSALS[op](*args)


def remarks() -> list[str]:
    """The instruction sets that were tried when the library was loaded, and are wrong here."""
    return [f"{isa} is refused: {reason}" for isa, reason in native.refused_isas().items()]
