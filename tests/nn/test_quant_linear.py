"""QuantLinear: computes with the dequantized weight, and keeps its bits through everything."""

import copy
import io

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRALinear, QuantLinear, quant
from lowrank.errors import (
    ConfigError,
    DtypeError,
    FileFormatError,
    ShapeError,
    TargetError,
    WeightError,
)
from tests.ops.oracle import assert_near, linear

SHAPES = [(1, 1), (33, 7), (63, 5), (123, 9), (256, 130)]  # K, N


def same_weight(a: QuantLinear, b: QuantLinear) -> bool:
    pairs = zip(a.storage.tensors.items(), b.storage.tensors.items(), strict=True)
    return all(n == m and t.dtype == u.dtype and torch.equal(t, u) for (n, t), (m, u) in pairs)


@pytest.fixture(params=[False, True], ids=["absmax32", "double"])
def quantizer(request):
    return quant.get("nf4", block_size=32, double_quant=request.param)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)]
)
@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_forward_and_gradients_are_those_of_the_dequantized_linear(
    K, N, dtype, tolerance, quantizer
):
    layer = QuantLinear(K, N, quantizer=quantizer).to(dtype)
    x = torch.randn(2, 5, K, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 5, N, dtype=dtype)
    y = layer(x)
    dx, dbias = torch.autograd.grad(y, (x, layer.bias), dy)
    assert y.dtype == dx.dtype == dbias.dtype == dtype
    exact, rounded = ((x, layer.dequantize(d), layer.bias, dy) for d in (torch.float64, dtype))
    assert_near((y, dx, dbias), linear, exact, tolerance, rounded)


def test_from_linear_quantizes_the_weight_and_keeps_the_bias():
    linear = nn.Linear(100, 30).eval()
    layer = QuantLinear.from_linear(linear, "nf4")
    expected = quant.get("nf4").quantize(linear.weight)
    assert all(torch.equal(t, expected[name]) for name, t in layer.storage.tensors.items())
    assert layer.bias is linear.bias and not layer.training
    assert QuantLinear.from_linear(nn.Linear(100, 30, bias=False), "nf4").bias is None


def test_the_storage_can_be_replaced_and_keeps_its_kind():
    layer = QuantLinear(64, 10)
    storage = quant.get("nf4", block_size=32, double_quant=False).quantize(torch.randn(10, 64))
    layer.storage = storage
    assert sorted(layer.state_dict()) == ["_extra_state", "absmax", "bias", "codebook", "packed"]
    assert layer.storage.options == storage.options and layer.storage.dtype == storage.dtype
    again = QuantLinear.from_storage(storage, "nf4")
    assert same_weight(layer, again) and again.bias is None
    own = quant.Storage("own", (10, 64), torch.float32, {"codes": torch.zeros(10, 64)})
    with pytest.raises(ConfigError, match="quantizer: expected one of .*; got 'own'"):
        layer.storage = own
    with pytest.raises(ShapeError, match=r"storage: expected a weight of shape \[10, 32\]"):
        QuantLinear(32, 10).storage = storage
    named = quant.Storage("own", (10, 64), torch.float32, {"weight": torch.zeros(10, 64)})
    with pytest.raises(ConfigError, match="storage: expected tensors not named weight or bias"):
        layer.storage = named
    assert same_weight(layer, again)


def test_every_parameter_of_the_weight_is_frozen_and_integer(quantizer):
    layer = QuantLinear(64, 10, quantizer=quantizer)
    kinds = {name: (p.requires_grad, p.is_floating_point()) for name, p in layer.named_parameters()}
    assert kinds.pop("bias") == (True, True)
    assert list(kinds) == list(layer.storage.tensors)
    assert set(kinds.values()) == {(False, False)}
    assert layer.storage["absmax"].dtype == (
        torch.uint8 if quantizer.double_quant else torch.float32
    )
    with pytest.raises(RuntimeError, match="floating point"):
        layer.requires_grad_(True)


def test_weights_only_torch_save(quantizer):
    layer, file = QuantLinear(64, 8, quantizer=quantizer), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = QuantLinear(64, 8, quantizer=quantizer)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same_weight(other, layer)


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_linears_state_dict_is_quantized_on_load(assign, quantizer):
    model = nn.ModuleDict({"proj": nn.Linear(100, 30)})
    ours = nn.ModuleDict({"proj": QuantLinear(100, 30, quantizer=quantizer)})
    outcome = ours.load_state_dict(model.state_dict(), assign=assign)
    assert not outcome.missing_keys and not outcome.unexpected_keys
    assert same_weight(ours["proj"], QuantLinear.from_linear(model["proj"], quantizer))
    assert torch.equal(ours["proj"].bias, model["proj"].bias)
    ours.load_state_dict(model.bfloat16().state_dict())
    assert ours["proj"].storage.dtype == torch.bfloat16


def test_missing_and_unexpected_keys_are_reported_as_torch_does():
    layer = QuantLinear(64, 8)
    tensors = layer.state_dict()
    with pytest.raises(RuntimeError, match='Missing key.*"absmax_scale"'):
        QuantLinear(64, 8).load_state_dict(
            {k: v for k, v in tensors.items() if k != "absmax_scale"}
        )
    with pytest.raises(RuntimeError, match='Unexpected key.*"extra"'):
        QuantLinear(64, 8).load_state_dict(tensors | {"extra": torch.ones(1)})
    outcome = QuantLinear(64, 8).load_state_dict({"bias": tensors["bias"]}, strict=False)
    weight = ["packed", "absmax", "absmax_scale", "codebook"]
    assert outcome.missing_keys == [*weight, "_extra_state"]


def test_other_options_without_their_description_are_refused_and_never_converted():
    double = QuantLinear(128, 8).state_dict()
    del double["_extra_state"]
    plain = QuantLinear(128, 8, quantizer=quant.get("nf4", double_quant=False))
    model = nn.ModuleDict({"up": plain})
    before = copy.deepcopy(plain)
    for strict in (False, True):
        with pytest.raises(
            DtypeError, match=r"up\.absmax: expected torch.int32 for nf4.*got torch.uint8"
        ):
            model.load_state_dict({f"up.{k}": v for k, v in double.items()}, strict=strict)
    other = QuantLinear(128, 8, quantizer=quant.get("nf4", block_size=32, double_quant=False))
    tensors = {k: v for k, v in other.state_dict().items() if k != "_extra_state"}
    with pytest.raises(ShapeError, match=r"absmax: expected \[8, 2\] for nf4.*got \[8, 4\]"):
        plain.load_state_dict(tensors)
    assert same_weight(plain, before)


def test_bad_weights_are_refused_by_name():
    model = nn.ModuleDict({"up": QuantLinear(64, 8)})
    tensors = {"up.weight": torch.randn(8, 64), "up.bias": torch.zeros(8)}
    with pytest.raises(ShapeError, match=r"up\.weight: expected \[8, 64\]; got \[64, 8\]"):
        model.load_state_dict(tensors | {"up.weight": torch.randn(64, 8)})
    tensors["up.weight"][2, 3] = float("nan")
    with pytest.raises(
        WeightError, match=r"up\.weight: expected finite values; got NaN or inf in row 2"
    ):
        model.load_state_dict(tensors)
    with pytest.raises(DtypeError, match=r"up\.weight: expected a floating-point dtype"):
        model.load_state_dict(tensors | {"up.weight": torch.zeros(8, 64, dtype=torch.uint8)})
    both = tensors | {f"up.{k}": v for k, v in model["up"].state_dict().items()}
    with pytest.raises(FileFormatError, match=r"up\.weight: .*got both"):
        model.load_state_dict(both)


def test_bad_arguments_are_named():
    layer = QuantLinear(100, 8)
    for x in (torch.randn(3, 128), torch.randn(8), torch.tensor(1.0)):
        with pytest.raises(ShapeError, match=r"x: expected \[..., K=100\]"):
            layer(x)
    for x in (torch.zeros(3, 100, dtype=torch.int64), [0.0] * 100, None):
        with pytest.raises(DtypeError, match="x: expected"):
            layer(x)
    with pytest.raises(
        ShapeError, match="in_features, out_features: expected at least 1; got 0, 8"
    ):
        QuantLinear(0, 8)
    for size in ("64", 64.0, None):
        with pytest.raises(ShapeError, match="in_features, out_features: expected .*; got .*, 8"):
            QuantLinear(size, 8)
    for dtype in (torch.int8, torch.float8_e4m3fn, "bfloat16"):
        with pytest.raises(DtypeError, match="^compute_dtype: expected a floating-point dtype"):
            QuantLinear(64, 8, compute_dtype=dtype)
        with pytest.raises(DtypeError, match="^dtype: expected a floating-point dtype"):
            QuantLinear(64, 8, dtype=dtype)
    for quantizer in (4, None, quant.CodebookQuantizer):
        with pytest.raises(ConfigError, match="quantizer: expected a name or an object"):
            QuantLinear(64, 8, quantizer=quantizer)
    for wrong in (None, nn.Embedding(8, 64), nn.Bilinear(8, 8, 8), layer, LoRALinear(64, 8)):
        with pytest.raises(TargetError, match="from_linear: expected an nn.Linear or .*; got "):
            QuantLinear.from_linear(wrong, "nf4")
    with pytest.raises(ConfigError, match="quantizer: expected one of"):
        QuantLinear(64, 8, quantizer="nf5")
    with pytest.raises(ShapeError, match=r"bias: expected \[N=8\]"):
        QuantLinear.from_storage(layer.storage, "nf4", nn.Parameter(torch.zeros(9)))
    with pytest.raises(DtypeError, match="bias: expected a tensor; got list"):
        QuantLinear.from_storage(layer.storage, "nf4", [0.0] * 8)
    for storage in (None, torch.randn(8, 100)):
        with pytest.raises(ConfigError, match="storage: expected a quant.Storage"):
            QuantLinear.from_storage(storage, "nf4")
        with pytest.raises(ConfigError, match="storage: expected a quant.Storage"):
            layer.storage = storage


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16, torch.float32])
def test_compute_dtype_and_autocast_give_the_dtype_of_nn_linear(compute_dtype):
    layer = QuantLinear(64, 8, compute_dtype=compute_dtype)
    dense = nn.Linear(64, 8)
    dense.load_state_dict({"weight": layer.dequantize(), "bias": layer.bias.detach()})
    for x in (torch.randn(3, 64), torch.randn(3, 64, dtype=torch.bfloat16)):
        reference = copy.deepcopy(dense).to(x.dtype)
        assert layer(x).dtype == reference(x).dtype
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = layer(x), reference(x)
        assert y.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    x = torch.randn(3, 64)
    rounded = (layer(x) - dense(x)).abs().max() > 1e-5
    assert rounded == (compute_dtype == torch.bfloat16)


def test_autocast_training_gives_float32_gradients():
    layer, x = QuantLinear(64, 8), torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().square().sum().backward()
    assert x.grad.dtype == layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize(("backend", "sizes"), [("aot_eager", (5, 9, 33)), ("inductor", (5,))])
def test_compile_fullgraph_forward_and_backward(backend, sizes):
    first = QuantLinear(96, 40, quantizer=quant.get("nf4", double_quant=False))
    model = nn.Sequential(first, nn.GELU(), QuantLinear(40, 7))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for M in sizes:
        x = torch.randn(M, 96, requires_grad=True)
        inputs = (x, model[0].bias, model[2].bias)
        got, expected = compiled(x), model(x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            torch.autograd.grad(got.square().sum(), inputs),
            torch.autograd.grad(expected.square().sum(), inputs),
            rtol=1e-4,
            atol=1e-5,
        )


def test_non_reentrant_checkpointing_is_bit_equal():
    model = nn.Sequential(QuantLinear(123, 64), nn.ReLU(), QuantLinear(64, 10))
    x = torch.randn(6, 123, requires_grad=True)
    y = model(x)
    (expected,) = torch.autograd.grad(y.square().sum(), x)
    again = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    (got,) = torch.autograd.grad(again.square().sum(), x)
    assert torch.equal(y, again) and torch.equal(got, expected)


def test_double_backward_in_float64():
    layer = QuantLinear(33, 6, dtype=torch.float64)
    x = torch.randn(2, 33, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,)) and torch.autograd.gradgradcheck(layer, (x,))


def test_a_fresh_layer_is_initialised_as_nn_linear():
    torch.manual_seed(0)
    layer = QuantLinear(1024, 512, quantizer=quant.get("nf4", double_quant=False))
    bound = 1 / 32
    assert layer.dequantize().abs().amax() <= bound and layer.bias.abs().amax() <= bound
    assert abs(layer.dequantize().std().item() - bound / 3**0.5) < 0.02 * bound


def test_the_repr_says_what_it_is():
    text = repr(QuantLinear(4096, 16, bias=False, compute_dtype=torch.bfloat16))
    assert "in_features=4096, out_features=16, bias=False, quantizer=nf4" in text
    assert "block_size=64, double_quant=True, 4.1" in text and "bits/weight" in text
    assert "compute_dtype=torch.bfloat16" in text
    assert lowrank.QuantLinear is QuantLinear
