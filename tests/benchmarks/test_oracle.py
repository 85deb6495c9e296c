"""The float64 decoders against the packages whose formats they read."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers
from benchmarks.harness import relative_error
from benchmarks.installed import LINEAR_SIDES, missing
from benchmarks.layers import LAYERS, refusal
from benchmarks.oracle import decode_torchao


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
@pytest.mark.parametrize("name", [name for name in LAYERS if missing(name) is None])
def test_layers_multiply_by_what_they_say_they_hold(name, dtype):
    weight = torch.randn(128, 128) * 0.05
    layer = LAYERS[name](weight, dtype)
    x = torch.randn(3, 128).to(dtype).requires_grad_()
    for module in layer.copies(2):
        with peers.quiet():
            y = module.train()(x)
        assert y.dtype == dtype
        assert relative_error(y.detach(), x.detach().double() @ layer.exact().T) < 2e-2
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert relative_error(dx, layer.exact().sum(0).expand(3, -1)) < 2e-2
    one, other = layer.copies(2)
    for mine, theirs in zip(tensors_of(one), tensors_of(other), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    held = [*module.parameters(), *getattr(module, "operands", ())]
    return [tensor for tensor in held if type(tensor.data) is torch.Tensor]


def test_the_sides_of_a_linear_layer_are_those_that_the_command_line_counts():
    assert tuple(LAYERS) == LINEAR_SIDES


def test_a_weight_that_a_side_cannot_hold_is_refused_with_the_reason():
    assert "16384" in refusal("torchao", 63, 192) and refusal("torchao", 64, 256) is None
    assert "multiple of 64" in refusal("compile", 64, 123) and refusal("compile", 63, 192) is None
    assert all(refusal(name, 63, 123) is None for name in ("lowrank", "torch", "dequantize"))


def test_torchao_format():
    """A tensor made by hand of the fields that torchao documents: codes, scales of scales, mean."""
    packed = torch.randint(0, 256, (64 * 256 // 2,), dtype=torch.uint8)
    scales = torch.randint(-128, 128, (256,), dtype=torch.int8)
    factor, mean, code = torch.tensor([300.0]), torch.tensor(0.5), torch.randn(16)
    exact = decode_torchao(packed, scales, factor, mean, code, torch.Size((64, 256)), 64, 256)
    element = 64 * 10 + 7  # of block 10, in a low nibble
    expected = code[int(packed[element // 2]) & 0xF] * (scales[10] / 300.0 + 0.5)
    assert float(exact.view(-1)[element]) == pytest.approx(float(expected), rel=1e-5)
    assert exact.shape == (64, 256) and exact.dtype == torch.float64
