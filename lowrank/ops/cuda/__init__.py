"""Launches the CUDA C++ kernels of `csrc/cuda/`, built where nvcc is; no Triton is needed.

`dispatch` calls `refuse` before an operator: what passes it is what the pointers need. Launches go
to torch's current stream of the tensors' device.
"""

from __future__ import annotations

from lowrank.ops import native

from . import adamw8bit, codebook
from .adamw8bit import adamw8bit_step as adamw8bit_step
from .codebook import codebook_dequantize as codebook_dequantize
from .codebook import codebook_linear as codebook_linear
from .codebook import codebook_linear_dx as codebook_linear_dx
from .codebook import codebook_quantize as codebook_quantize
from .codebook import linear_from_codes as linear_from_codes
from .codebook import most_fused_rows as most_fused_rows

_REFUSALS = codebook.REFUSALS | adamw8bit.REFUSALS


def missing() -> str | None:
    """Why the CUDA library cannot run here at all, or None if it can."""
    library = native.load_cuda()
    return library if isinstance(library, str) else None


def refuse(op: str, *args) -> str | None:
    """Why the CUDA library will not run `op` on these arguments, or None if it will."""
    return _REFUSALS[op](*args) or missing()
