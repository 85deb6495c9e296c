"""Run by test_triton.py in its own process: Triton's decorators bind the interpreter at import.

What the interpreter does to bfloat16 is wrong: the kernels cast before they multiply, and
a result that it truncates where it should round is one unit in the last place away.
"""

from __future__ import annotations

import itertools
import os
import sys

import torch
from torch import Tensor

from tests.ops.interpreted_dequantize import random_weight

ROWS = [1, 5, 17, 33, 64, 65]  # a row alone, every tile, and one more than is fused
SHAPES = [(1, 1), (3, 63), (9, 123), (40, 257), (520, 33)]  # the last: a sum in parts in dx
# Two roundings, of weight and result, of 2^-11 each; bfloat16 the interpreter truncates, by 2^-7.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10 + 2e-6, torch.bfloat16: 2**-6 + 2e-6}


def check(got: Tensor, exact: Tensor, bound: Tensor, context: str) -> None:
    """Within the tolerance of its dtype, relative to the sum of the terms' magnitudes `bound`."""
    assert got.shape == exact.shape and torch.isfinite(got).all(), context
    error = (got.double() - exact).abs()
    subnormal = torch.finfo(got.dtype).smallest_normal
    assert (error <= TOLERANCE[got.dtype] * bound + subnormal).all(), f"{context} {error.max()}"


def main(seed: int) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from lowrank.ops import reference
    from lowrank.ops import triton as interpreted

    torch.use_deterministic_algorithms(True)  # torch.empty comes full of NaN
    g = torch.Generator().manual_seed(seed)
    cases = list(itertools.product(SHAPES, ROWS))
    dtypes = list(TOLERANCE)
    for i, ((N, K), M) in enumerate(cases):
        dtype, G = dtypes[(i + i // len(ROWS)) % 3], (32, 64, 256)[i % 3]
        double_quant, per_row = torch.randint(2, (2,), generator=g).bool().tolist()
        weight = random_weight(N, K, G, double_quant, per_row, g)
        w = reference.codebook_dequantize(*weight, K, G, torch.float32).double()
        bias = torch.randn(N, generator=g).to(dtype) if i % 2 else None
        x = torch.randn(2 * M, 2 * K, generator=g).to(dtype)[::2, 1::2]  # neither dim contiguous
        dy = torch.randn(N, M, generator=g).to(dtype).T
        context = f"{M=} {N=} {K=} {G=} {double_quant=} {per_row=} {dtype} {seed=}"
        assert interpreted.refuse("codebook_linear", x) is None

        y = interpreted.codebook_linear(x, *weight, bias, G)
        again = interpreted.codebook_linear(x, *weight, bias, G)
        assert torch.equal(y, again), context
        b = 0 if bias is None else bias.double()
        bound = x.double().abs() @ w.abs().T + (0 if bias is None else bias.double().abs())
        check(y, x.double() @ w.T + b, bound, "y " + context)

        dx = interpreted.codebook_linear_dx(dy, *weight, K, G)
        check(dx, dy.double() @ w, dy.double().abs() @ w.abs(), "dx " + context)
    print(f"{len(cases)} cases right")


if __name__ == "__main__":
    main(int(sys.argv[1]))
