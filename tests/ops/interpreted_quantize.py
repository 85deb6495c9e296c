"""Run by test_triton.py in its own process: Triton's decorators bind the interpreter at import."""

from __future__ import annotations

import itertools
import os
import sys

import torch

SHAPES = [(3, 63), (2, 123), (1, 1), (4, 64), (2, 2049), (2, 4500)]
BLOCKS = [32, 64, 4096]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def hard_weight(N: int, K: int, table: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Random values, a block of zeros, and values that are midpoints exactly."""
    weight = torch.randn(N, K, generator=g)
    mids = (table[0, 1:] + table[0, :-1]) / 2
    weight[0, : K // 2] = mids[torch.randint(15, (K // 2,), generator=g)]
    weight[0, 0] = 1.0
    weight[-1, : min(K, 64)] = 0
    return weight


def main(seed: int) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from lowrank.ops import reference
    from lowrank.ops import triton as interpreted

    torch.use_deterministic_algorithms(True)  # torch.empty comes full of its largest integer
    g = torch.Generator().manual_seed(seed)
    cases = list(itertools.product(SHAPES, BLOCKS, (False, True), (False, True)))
    for (N, K), G, is_sorted, per_row in cases:
        table = torch.rand(N if per_row else 1, 16, generator=g) * 2 - 1
        if is_sorted:
            table = table.sort(dim=1).values.contiguous()
        for dtype in DTYPES:
            weight = hard_weight(N, K, table, g).to(dtype)
            if dtype == torch.float32:  # the interpreter reads others of bfloat16
                weight[N // 2] *= 1e-39  # subnormal
            for w in (weight, weight.T.contiguous().T):
                packed, absmax = interpreted.codebook_quantize(w, table, G)
                want_packed, want_absmax = reference.codebook_quantize(w, table, G)
                context = f"{N=} {K=} {G=} {is_sorted=} {per_row=} {dtype} {seed=}"
                assert torch.equal(absmax, want_absmax), context
                assert torch.equal(packed, want_packed), context
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = torch.randn(3, 70, generator=g)
        weight[1, 65] = bad
        _, absmax = interpreted.codebook_quantize(weight, table, 64)
        assert torch.isfinite(absmax).tolist() == [[True] * 2, [True, False], [True] * 2]
    print(f"{len(cases)} cases equal")


if __name__ == "__main__":
    main(int(sys.argv[1]))
