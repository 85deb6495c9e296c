"""Run by test_triton.py in its own process: Triton's decorators bind the interpreter at import."""

from __future__ import annotations

import itertools
import os
import sys

import torch

SHAPES = [(3, 63), (2, 123), (1, 1), (4, 32), (2, 2049), (2, 4500)]
BLOCKS = [32, 64, 256, 4096]
DTYPES = [torch.float32, torch.float16]  # the interpreter truncates where bfloat16 should round


def random_weight(
    N: int, K: int, G: int, double_quant: bool, per_row: bool, g: torch.Generator
) -> tuple:
    """Packed codes (pads too), scales over many magnitudes and any codebook at all."""
    blocks = -(-K // G)
    packed = torch.randint(256, (N, (K + 31) // 32 * 16), dtype=torch.uint8, generator=g)
    codebook = torch.randn(N if per_row else 1, 16, generator=g)
    if not double_quant:
        return packed, torch.rand(N, blocks, generator=g), None, codebook
    codes = torch.randint(256, (N, blocks), dtype=torch.uint8, generator=g)
    return packed, codes, torch.rand(N, 2, generator=g) * 0.01, codebook


def main(seed: int) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from lowrank.ops import reference
    from lowrank.ops import triton as interpreted

    torch.use_deterministic_algorithms(True)  # torch.empty comes full of NaN
    g = torch.Generator().manual_seed(seed)
    cases = list(itertools.product(SHAPES, BLOCKS, (False, True), (False, True)))
    for (N, K), G, double_quant, per_row in cases:
        weight = random_weight(N, K, G, double_quant, per_row, g)
        for dtype in DTYPES:
            got = interpreted.codebook_dequantize(*weight, K, G, dtype)
            want = reference.codebook_dequantize(*weight, K, G, dtype)
            assert torch.equal(got, want), (
                f"N={N} K={K} G={G} {double_quant=} {per_row=} {dtype} {seed=}"
            )
    print(f"{len(cases)} cases equal")


if __name__ == "__main__":
    main(int(sys.argv[1]))
