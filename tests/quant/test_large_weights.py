"""More than 2^31 weights in one tensor, where a 32-bit index would come round to the beginning."""

import pytest
import torch

from lowrank import quant

N, K = (1 << 16) + 1, 1 << 15
ROWS = [0, 1, 1 << 15, (1 << 16) - 1, 1 << 16]  # of numbers; the others are zeros

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "tensor"), [("nf4", "packed"), ("int8", "CB")])
def test_more_weights_than_31_bits_count(name, tensor):
    """Through the kernels, and by panels of rows, as every scheme goes that has no kernel."""
    assert N * K > 1 << 31
    weight = torch.zeros(N, K, dtype=torch.bfloat16)  # pages that nobody writes take no memory
    few = torch.randn(len(ROWS), K).bfloat16()
    weight[ROWS] = few
    quantizer = quant.get(name)
    storage = quantizer.quantize(weight)
    del weight
    alone = quantizer.quantize(few)
    W = quantizer.dequantize(alone)
    assert 0 < (W - few).norm() / few.norm() < 0.1
    for i, n in enumerate(ROWS):
        assert torch.equal(storage.rows(n, n + 1).tensors[tensor][0], alone[tensor][i])
    x = torch.randn(2, K)
    y = quant.linear(quantizer, x, storage)
    torch.testing.assert_close(y[:, ROWS], x @ W.T, rtol=1e-4, atol=1e-3)
    assert y.count_nonzero() == y[:, ROWS].count_nonzero()
    dense = quantizer.dequantize(storage, torch.bfloat16)
    assert torch.equal(dense[ROWS], W.bfloat16())
    assert sum(dense[n : n + 1024].count_nonzero() for n in range(0, N, 1024)) == (
        W.count_nonzero()
    )
