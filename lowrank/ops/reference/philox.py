"""Which elements dropout keeps: a function of seed, row and column, so that no mask is ever stored.

Element (m, k) of x [M, K] is word k % 4 of Philox-4x32 with 7 rounds, whose counter is the words
(q low, q high, 0, 0) of q = m * ceil(K / 4) + k // 4 and whose key is the seed's two words. It is
kept iff that word >= p * 2^32. Every backend has the same bits in whatever tiles it computes them.
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7  # the fewest that pass BigCrush, by the paper's table 2

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The least word that is kept, as a uint32: P(word < threshold) is p to 2^-32."""
    return min(round(p * 2**32), _LOW)


def kept(rows: Tensor, K: int, p: float, seed: Tensor) -> Tensor:
    """Whether elements (m, 0 <= k < K) are kept, for the rows m of `rows` [M]: bool [M, K]."""
    quads = (K + 3) // 4
    q = rows.long()[:, None] * quads + torch.arange(quads, device=rows.device)  # [M, quads]
    zero = torch.zeros_like(q)
    words = philox((q & _LOW, q >> 32 & _LOW, zero, zero), (seed & _LOW, seed >> 32 & _LOW))
    return torch.stack(words, dim=-1).flatten(1)[:, :K] >= threshold(p)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words of a counter of four words and a key of two, each in [0, 2^32) as int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # as int64 the products wrap around; their 64 bits are those of the unsigned ones
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (odd >> 32 & _LOW) ^ c1 ^ k0, odd & _LOW
        c2, c3 = (even >> 32 & _LOW) ^ c3 ^ k1, even & _LOW
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return c0, c1, c2, c3
