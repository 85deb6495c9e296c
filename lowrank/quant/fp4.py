"""FP4: sign, two bits of exponent, one of mantissa, as bitsandbytes numbers and scales them."""

from __future__ import annotations

from .codebook import FixedCodebook
from .codebooks import FP4 as TABLE
from .registry import register


@register("fp4")
class FP4(FixedCodebook):
    """Evenly fine in relative terms; bitsandbytes' codes, in bit-pattern order with two zeros."""

    table = TABLE
