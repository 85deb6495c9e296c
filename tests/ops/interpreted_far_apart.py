"""Run by test_far_apart.py in its own process: Triton's decorators bind the interpreter at import.

The kernels are launched with strides that put their few rows more than 2^31 elements apart.
"""

from __future__ import annotations

import itertools
import os
import sys

import torch

from tests.ops.sparse import rows_apart
from tests.ops.weights import dense, random_weight

STRIDES = [3 << 29, (1 << 31) + 64]  # row 2 is beyond 2^31, and each stride is
M, N, K, G = 3, 5, 70, 32


def main(seed: int) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl

    from lowrank.kernels import configs
    from lowrank.kernels.codebook_dequantize import codebook_dequantize_kernel
    from lowrank.kernels.codebook_linear import codebook_linear_kernel, codebook_linear_row_kernel
    from lowrank.kernels.codebook_linear_dx import codebook_linear_dx_kernel
    from lowrank.ops import reference
    from lowrank.ops import triton as interpreted

    torch.manual_seed(seed)
    cases = list(itertools.product(STRIDES, (False, True)))
    for stride, double_quant in cases:
        context = f"{stride=} {double_quant=} {seed=}"
        packed, absmax, scale, codebook = random_weight(N, K, G, double_quant, tables=N)
        w = dense(packed, absmax, scale, codebook, K, G)
        far = (rows_apart(packed, stride), rows_apart(absmax, stride), scale)

        weight = torch.randn(N, K)
        got = interpreted.codebook_quantize(rows_apart(weight, stride), codebook, G)
        assert all(map(torch.equal, got, reference.codebook_quantize(weight, codebook, G))), context

        out, tables = torch.full((N, K), torch.nan), rows_apart(codebook, stride)
        codebook_dequantize_kernel[(N, 1)](
            *far, tables, out, K, stride, stride, stride, **configs.dequantize(K, G)
        )
        assert torch.equal(out, w), context

        x, dy = torch.randn(M, K), torch.randn(M, N)
        y, dx = torch.full((M, N), torch.nan), torch.full((M, K), torch.nan)
        config = configs.linear(M, K, G, True)
        codebook_linear_kernel[(1, 1)](
            rows_apart(x, stride), *far, codebook, None, y, M, N, stride, stride, stride,
            K=K, PER_ROW=True, DOT=tl.float32, **config,
        )  # fmt: skip
        torch.testing.assert_close(y, x @ w.T, rtol=1e-5, atol=1e-5, msg=context)

        config = configs.linear_row(K, G)
        codebook_linear_row_kernel[(-(-N // config["BLOCK_N"]),)](
            x, *far, codebook, None, y, N, stride, stride, K=K, PER_ROW=True, **config
        )
        torch.testing.assert_close(y[0], x[0] @ w.T, rtol=1e-5, atol=1e-5, msg=context)

        config = configs.linear_dx(M, G, True)
        codebook_linear_dx_kernel[(-(-K // config["SPAN"]), 1, 1)](
            rows_apart(dy, stride), *far, codebook, dx, M, N, K, stride, stride, stride,
            PART=config["BLOCK_N"], PER_ROW=True, DOT=tl.float32, **config,
        )  # fmt: skip
        torch.testing.assert_close(dx, dy @ w, rtol=1e-5, atol=1e-5, msg=context)
    print(f"{len(cases)} cases right")


if __name__ == "__main__":
    main(int(sys.argv[1]))
