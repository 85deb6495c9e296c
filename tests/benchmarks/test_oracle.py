"""The float64 decoders against the packages whose formats they read."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers
from benchmarks.harness import relative_error


@pytest.mark.parametrize("shape", [(63, 192), (128, 256)])
def test_bitsandbytes_format(shape):
    bnb = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(shape)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    exact = peers.exact_bitsandbytes(peers.bitsandbytes_tensors(packed, state), weight.shape)
    assert exact.dtype == torch.float64
    assert relative_error(bnb.dequantize_4bit(packed, state), exact) < 1e-7


@pytest.mark.parametrize("shape", [(63, 123), (5, 32), (48, 576)])
def test_lowrank_format(shape):
    weight = torch.randn(shape)
    quantizer = peers.lowrank_quantizer()
    storage = quantizer.quantize(weight)
    exact = peers.exact_lowrank(storage)
    assert exact.shape == weight.shape
    assert relative_error(quantizer.dequantize(storage, torch.float32), exact) < 1e-7
    assert relative_error(exact, weight.double()) < 0.12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["torch", "lowrank", "bitsandbytes"])
def test_layers_multiply_by_what_they_say_they_hold(name, dtype):
    if peers.missing(name) is not None:
        pytest.skip(peers.missing(name))
    weight = torch.randn(64, 128) * 0.05
    layer = peers.LAYERS[name](weight, dtype)
    x = torch.randn(3, 128).to(dtype)
    for module in layer.copies(2):
        y = module.train()(x)
        assert y.dtype == dtype
        assert relative_error(y, x.double() @ layer.exact.T) < 2e-2
    one, other = layer.copies(2)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()
