"""NF4: the quantiles of a normal distribution as the codebook.   QLoRA, arXiv:2305.14314, §3."""

from __future__ import annotations

from .codebook import FixedCodebook
from .codebooks import NF4 as TABLE
from .registry import register


@register("nf4")
class NF4(FixedCodebook):
    """4.5 bits a weight at block size 64, about 4.13 with double quantization."""

    table = TABLE
