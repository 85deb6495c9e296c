"""Symmetric int4: 15 equidistant values from -absmax to absmax, zero in the middle."""

from __future__ import annotations

from .codebook import FixedCodebook
from .registry import register


@register("int4")
class Int4(FixedCodebook):
    """w = level * absmax / 7 for levels -7 to 7; code = level + 7.

    As a codebook it has the fused kernels of NF4. Code 15 doubles 14 and is never produced.
    """

    table = tuple(min(level, 7) / 7 for level in range(-7, 9))
