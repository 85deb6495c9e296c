"""Whether this CPU multiplies matrices of 16 bits faster than those of 32."""

from __future__ import annotations

from functools import cache

import torch

from lowrank.ops import native


def multiplies_bfloat16(dtype: torch.dtype) -> bool:
    """Whether a product of this dtype is best done in bfloat16, accumulated in float32.

    AMX is five times as fast in it as AVX-512 is in float32, AVX512-BF16 twice. Where the kernels
    are held to a smaller instruction set, torch is as well, and float32 stays the fast one.
    """
    return dtype == torch.bfloat16 and _has_units() and native.isa() == "avx512"


@cache
def _has_units() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
