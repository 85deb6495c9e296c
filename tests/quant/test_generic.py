"""A quantizer of two functions gets a linear with gradients, and a place in the registry."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank import QuantLinear, quant
from lowrank.errors import ConfigError, DtypeError, ShapeError
from tests.ops.oracle import assert_near, linear


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
    assert y.dtype == dx.dtype == dbias.dtype == dtype
    assert_near((y, dx, dbias), linear, (x, W, bias, dy), tolerance)


@pytest.mark.parametrize("quantizer", [RowInt8(), quant.get("hqq"), quant.get("nf4")])
def test_bad_operands_are_named(quantizer):
    x, bias = torch.randn(3, 64), torch.randn(20)
    storage = quantizer.quantize(torch.randn(20, 64))
    for wrong, b, kind, match in (
        (None, bias, DtypeError, "x: expected a tensor; got NoneType"),
        (x.to_sparse(), bias, DtypeError, "x: expected a dense tensor"),
        (x.int(), bias, DtypeError, "x: expected torch.float32 or .*; got torch.int32"),
        (x.to(torch.complex64), bias, DtypeError, "x: expected torch.float32 or .*complex64"),
        (x[:, :63], bias, ShapeError, r"x: expected \[..., K=64\]; got \[3, 63\]"),
        (x.to("meta"), None, ConfigError, "x: expected on cpu, with the rest; got meta"),
        (x, bias[:1], ShapeError, r"bias: expected \[N=20\]; got \[1\]"),
        (x, 3, DtypeError, "bias: expected a tensor; got int"),
    ):
        with pytest.raises(kind, match=f"^{match}"):
            quant.linear(quantizer, wrong, storage, b)


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
        "_extra_state": torch.uint8,
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
    misspelled = type("Misspelled", (), {"quantise": RowInt8.quantize, "dequantise": None})
    for wrong in (misspelled, RowInt8(), quant.get):
        with pytest.raises(ConfigError, match="'test-wrong': expected a class with quantize and"):
            quant.register("test-wrong")(wrong)
    for name in (None, "", 3):
        with pytest.raises(ConfigError, match="register: expected the name of a quantizer; got"):
            quant.register(name)
    for name in (None, "test-wrong", ["nf4"], {}):
        with pytest.raises(ConfigError, match="quantizer: expected one of .*; got "):
            quant.get(name)


class Largest(TorchDispatchMode):
    """The bytes of the largest piece of memory that an operator returns, of those not known."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(
    "name", ["nf3", "int4_affine", "hqq", "int8", "int8_blockwise", "flat", "none"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_dense_weight_exists_in_training(dtype, name):
    N, K, panel = 700, 3000, 1 << 20
    quantizer = quant.get(name)
    storage = quantizer.quantize(torch.randn(N, K))
    x = torch.randn(7, K, dtype=dtype, requires_grad=True)
    dy = torch.randn(7, N, dtype=dtype)
    with Largest(storage.tensors.values()) as seen:
        quant.linear(quantizer, x, storage).backward(dy)
    assert 0 < seen.bytes <= 4 * 1.05 * panel  # indices of int32, or the float32 weights
    with Largest(storage.tensors.values()) as dense:
        W = quantizer.dequantize(storage)
    assert dense.bytes >= 4 * N * K  # so that the test would see one
    got = (quant.linear(quantizer, x, storage), x.grad)
    assert_near(got, linear, (x, W, None, dy), 1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's, at graph breaks
@pytest.mark.parametrize("name", ["int8", "nf3"])
def test_a_compiled_layer_keeps_no_dense_weight_either(name):
    model = torch.nn.Sequential(QuantLinear(96, 40, quantizer=name), torch.nn.ReLU())
    compiled = torch.compile(model, backend="aot_eager")
    x, kept = torch.randn(5, 96, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = compiled(x)
    assert all(t.numel() < 96 * 40 or t.dtype == torch.int8 for t in kept)
    expected = model(x)
    assert torch.equal(y, expected)
    got, wanted = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(got, wanted)


def test_a_scheme_that_is_not_row_local_is_dequantized_whole():
    calls = []

    class Whole(RowInt8):
        def dequantize(self, storage, dtype=torch.float32):
            calls.append(storage.shape)
            return super().dequantize(storage, dtype)

    class Local(Whole):
        row_local = True

    weight, x = torch.randn(40, 1 << 16), torch.randn(2, 1 << 16, requires_grad=True)
    results = []
    for quantizer in (Whole(), Local()):
        calls.clear()
        y = quant.linear(quantizer, x, quantizer.quantize(weight))
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y.detach(), dx))
        parts = [(16, 1 << 16), (16, 1 << 16), (8, 1 << 16)]
        assert calls == 2 * (parts if isinstance(quantizer, Local) else [(40, 1 << 16)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-2)


def test_double_backward_in_float64():
    quantizer = quant.get("int8")
    storage = quantizer.quantize(torch.randn(6, 33))
    x = torch.randn(2, 33, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def f(x, bias):
        return quant.linear(quantizer, x, storage, bias)

    assert torch.autograd.gradcheck(f, (x, bias)) and torch.autograd.gradgradcheck(f, (x, bias))


def test_rows_of_what_has_none_are_refused():
    tensors = {"codes": torch.zeros(4, 8), "table": torch.zeros(16)}
    storage = quant.Storage("own", (4, 8), torch.float32, tensors)
    with pytest.raises(ShapeError, match=r"table: expected \[N=4, ...\] or \[1, ...\].*got \[16\]"):
        storage.rows(0, 2)
