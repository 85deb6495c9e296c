"""A quantizer of two functions gets a linear with gradients, and a place in the registry."""

import copy

import pytest
import torch

from lowrank import QuantLinear, quant
from lowrank.errors import ConfigError


class RowInt8:
    """Symmetric 8 bits a row; its scales are float16, to be kept as 16-bit integers."""

    def quantize(self, weight):
        scale = (weight.abs().amax(1, keepdim=True) / 127).half()
        codes = (weight / scale.float().clamp(min=1e-6)).round().clamp(-127, 127).to(torch.int8)
        return quant.Storage(
            "rowint8", tuple(weight.shape), weight.dtype, {"codes": codes, "scale": scale}
        )

    def dequantize(self, storage, dtype=torch.float32):
        return (storage["codes"].float() * storage["scale"].float()).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float64, 1e-12)]
)
def test_linear_and_gradients_equal_the_dense_ones(dtype, tolerance):
    quantizer = RowInt8()
    storage = quantizer.quantize(torch.randn(20, 63))
    x = torch.randn(2, 5, 63, dtype=dtype, requires_grad=True)
    bias = torch.randn(20, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 5, 20, dtype=dtype)
    y = quant.linear(quantizer, x, storage, bias)
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    W = quantizer.dequantize(storage, torch.float64)
    for got, expected in (
        (y, x.double() @ W.T + bias.double()),
        (dx, dy.double() @ W),
        (dbias, dy.double().sum((0, 1))),
    ):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() / expected.norm() < tolerance


def test_only_the_storage_is_kept_for_backward():
    quantizer, kept = RowInt8(), []
    storage = quantizer.quantize(torch.randn(20, 64))
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quant.linear(quantizer, x, storage)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in storage.tensors.values()}


def test_a_layer_of_an_own_quantizer_trains_saves_and_survives_casts(tmp_path):
    linear = torch.nn.Linear(64, 10)
    layer = QuantLinear.from_linear(linear, RowInt8())
    assert {k: v.dtype for k, v in layer.state_dict().items()} == {
        "bias": torch.float32,
        "codes": torch.int8,
        "scale": torch.int16,
    }
    W = layer.dequantize()
    assert (W - linear.weight).abs().max() < 0.01
    assert torch.equal(copy.deepcopy(layer).bfloat16().dequantize(), W)
    other = QuantLinear(64, 10, quantizer=RowInt8())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(), W)
    x = torch.randn(4, 64, requires_grad=True)
    other(x).sum().backward()
    torch.testing.assert_close(x.grad, W.sum(0).expand(4, -1))


def test_register_gives_the_name_and_refuses_a_second_owner():
    @quant.register("test-row-int8")
    class Named(RowInt8):
        pass

    assert "test-row-int8" in quant.names() and quant.get("test-row-int8").name == "test-row-int8"
    quant.register("test-row-int8")(Named)
    with pytest.raises(ConfigError, match="'test-row-int8' is registered"):
        quant.register("test-row-int8")(type("Other", (RowInt8,), {}))
