"""More than 2^31 weights in one tensor, where a 32-bit index would come round to the beginning."""

import math
import mmap
from dataclasses import replace

import pytest
import torch

from lowrank import quant

from .schemes import label, same, variants

N, K = (1 << 16) + 1, 1 << 15
ROWS = [0, 1, 1 << 15, (1 << 16) - 1, 1 << 16]  # of numbers; the others are zeros


def zeros(shape, dtype) -> torch.Tensor:
    """Zeros in pages of their own, of which those that nobody writes take no memory."""
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@pytest.mark.parametrize("variant", variants(), ids=label)
def test_rows_beyond_31_bits_are_where_they_belong(variant):
    """Weight and storage are of full size, and hold only these rows."""
    name, options = variant
    quantizer = quant.get(name, **options)
    few = torch.randn(len(ROWS), K).bfloat16()
    weight = zeros((N, K), torch.bfloat16)
    weight[ROWS] = few
    assert same(quantizer.quantize(weight[-1:]), quantizer.quantize(few[-1:]))

    alone = quantizer.quantize(few)
    layout = quantizer.quantize(weight.to("meta"))
    tensors = {key: zeros(t.shape, t.dtype) for key, t in layout.tensors.items()}
    for key, tensor in tensors.items():
        if tensor.numel() * len(ROWS) == alone[key].numel() * N:
            tensor.view(N, -1)[ROWS] = alone[key].view(len(ROWS), -1)
        else:  # of all rows together
            tensor.copy_(alone[key])
    storage, W = replace(layout, tensors=tensors), quantizer.dequantize(alone)
    assert torch.equal(quant.gather(quantizer, storage, torch.tensor(ROWS), torch.float32), W)
    for i, n in enumerate(ROWS):
        row = quant.dequantize_rows(quantizer, storage, n, n + 1, torch.float32)
        assert torch.equal(row, W[i : i + 1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "tensor"),
    [("nf4", {}, "packed"), ("flat", {"double_quant": False}, "packed"), ("int8", {}, "CB")],
)
def test_more_weights_than_31_bits_count(name, options, tensor):
    """Through the kernels, and by panels of rows, as every scheme goes that has no kernel."""
    assert N * K > 1 << 31
    weight = zeros((N, K), torch.bfloat16)
    few = torch.randn(len(ROWS), K).bfloat16()
    weight[ROWS] = few
    quantizer = quant.get(name, **options)
    storage = quantizer.quantize(weight)
    del weight
    alone = quantizer.quantize(few)
    W = quantizer.dequantize(alone)
    assert 0 < (W - few).norm() / few.norm() < 0.1
    for i, n in enumerate(ROWS):
        assert torch.equal(storage[tensor].view(N, -1)[n], alone[tensor].view(len(ROWS), -1)[i])
    x = torch.randn(2, K)
    y = quant.linear(quantizer, x, storage)
    torch.testing.assert_close(y[:, ROWS], x @ W.T, rtol=1e-4, atol=1e-3)
    assert y.count_nonzero() == y[:, ROWS].count_nonzero()
    dense = quantizer.dequantize(storage, torch.bfloat16)
    assert torch.equal(dense[ROWS], W.bfloat16())
    assert sum(dense[n : n + 1024].count_nonzero() for n in range(0, N, 1024)) == (
        W.count_nonzero()
    )
