"""The 16-entry tables of the 4-bit schemes, in float32. A code is an index into its table."""

from __future__ import annotations

# Quantiles of N(0, 1), an exact zero among them.   QLoRA, arXiv:2305.14314, §3 and appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# Sign, two bits of exponent, one of mantissa, over the largest: bitsandbytes' numbering, in which 8
# is a second zero, as good as 0 (no -0.0).
FP4 = tuple(
    sign * magnitude / 12 + 0.0 for sign in (1, -1) for magnitude in (0, 0.0625, 8, 12, 4, 6, 2, 3)
)
