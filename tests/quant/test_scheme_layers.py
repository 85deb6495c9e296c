"""Every registered scheme inside layers: products, gradients, casts, files, training."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from lowrank import QuantLinear, quant
from lowrank.errors import LowrankError, ShapeError
from tests.ops.oracle import assert_near, linear, lora
from tests.surgery.training import assert_merges_and_back, train

from .schemes import label, make, same, variants

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.float64: 2e-6}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_and_gradients_are_those_of_the_dequantized_weight(dtype, quantizer):
    for N, K in ((1, 1), (20, 123), (5, 256)):
        storage = quantizer.quantize(torch.randn(N, K))
        x = torch.randn(2, 3, K, dtype=dtype, requires_grad=True)
        bias = torch.randn(N, dtype=dtype, requires_grad=True)
        dy = torch.randn(2, 3, N, dtype=dtype)
        y = quant.linear(quantizer, x, storage, bias)
        dx, dbias = torch.autograd.grad(y, (x, bias), dy)
        assert y.dtype == dx.dtype == dbias.dtype == dtype
        weights = (quantizer.dequantize(storage, kind) for kind in (torch.float64, dtype))
        exact, rounded = ((x, W, bias, dy) for W in weights)
        assert_near((y, dx, dbias), linear, exact, TOLERANCE[dtype], rounded)


def test_an_adapter_beside_it_and_every_gradient(quantizer):
    config = lowrank.LoRAConfig(r=4, lora_alpha=8)
    layer = lowrank.LoRALinear(123, 20, config=config, quantizer=quantizer)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(B)
    x, dy = torch.randn(7, 123, requires_grad=True), torch.randn(7, 20)
    y = layer(x)
    got = (y, *torch.autograd.grad(y, (x, A, B), dy))
    W = layer.base_layer.dequantize(torch.float64)
    assert all(t.dtype == torch.float32 for t in got)
    scale = torch.tensor(layer.scaling["default"])
    assert_near(got, lora, (x, W, layer.bias, A, B, scale, dy), 3e-6)


def test_checkpointing_is_bit_equal(quantizer):
    model = nn.Sequential(
        QuantLinear(33, 24, quantizer=quantizer), nn.Tanh(), QuantLinear(24, 5, quantizer=quantizer)
    )
    x = torch.randn(6, 33, requires_grad=True)
    inputs = (x, model[0].bias, model[2].bias)
    expected = torch.autograd.grad(model(x).square().sum(), inputs)
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    got = torch.autograd.grad(y.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_no_rows_of_x_and_wrong_widths(quantizer):
    storage = quantizer.quantize(torch.randn(20, 64))
    assert quant.linear(quantizer, torch.randn(2, 0, 64), storage).shape == (2, 0, 20)
    for x in (torch.randn(3, 63), torch.randn(3, 65), torch.tensor(1.0)):
        with pytest.raises(ShapeError, match=r"x: expected \[..., K=64\]; got \["):
            quant.linear(quantizer, x, storage)


def test_casts_and_copies_leave_the_bits_unchanged(quantizer):
    layer = QuantLinear(123, 9, quantizer=quantizer)
    assert not any(p.is_floating_point() for n, p in layer.named_parameters() if n != "bias")
    for cast in (
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to(torch.bfloat16).to(torch.float32),
        lambda m: m.half().float(),
        lambda m: m.double(),
        lambda m: m.train().eval(),
        lambda m: nn.Sequential(m).to("cpu", torch.float16)[0],
    ):
        other = cast(copy.deepcopy(layer))
        assert same(other.storage, layer.storage)
        assert torch.equal(other.dequantize(), layer.dequantize())
        x = torch.randn(3, 123, dtype=other.bias.dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = other(x)
        assert y.dtype == (torch.float64 if x.dtype == torch.float64 else torch.bfloat16)
        assert same(other.storage, layer.storage)


def test_codes_cannot_be_trained(quantizer):
    model = nn.Sequential(nn.Linear(8, 64), QuantLinear(64, 8, quantizer=quantizer))
    assert all(not p.requires_grad for n, p in model[1].named_parameters() if n != "bias")
    with pytest.raises(RuntimeError, match="floating point"):
        model.requires_grad_(True)
    model.requires_grad_(False)


def test_files_meta_skeletons_and_to_empty(tmp_path, quantizer):
    layer = QuantLinear.from_linear(nn.Linear(123, 9), quantizer)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    tensors = load_file(tmp_path / "layer.safetensors")
    for assign in (False, True):
        with torch.device("meta"):
            other = QuantLinear(123, 9, quantizer=quantizer)
        assert all(p.is_meta for p in other.parameters())
        if not assign:
            other.to_empty(device="cpu")
        other.load_state_dict(tensors, assign=assign)
        assert same(other.storage, layer.storage) and torch.equal(other.bias, layer.bias)
        assert not any(p.requires_grad for n, p in other.named_parameters() if n != "bias")
        x = torch.randn(3, 123)
        assert torch.equal(other(x), layer(x))


def test_a_state_dict_is_loaded_whole_or_refused(quantizer):
    layer = QuantLinear(64, 8, quantizer=quantizer)
    tensors = QuantLinear(64, 8, quantizer=quantizer).state_dict()
    before = copy.deepcopy(layer.storage)
    for name in layer.storage.tensors:
        without = {k: v for k, v in tensors.items() if k != name}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            copy.deepcopy(layer).load_state_dict(without)
        outcome = copy.deepcopy(layer).load_state_dict(without, strict=False)
        assert outcome.missing_keys == [name]
        for strict in (False, True):
            for wrong in (tensors[name].flatten()[:0], tensors[name].double()):
                with pytest.raises(LowrankError, match=f"{name}: expected"):
                    layer.load_state_dict(tensors | {name: wrong}, strict=strict)
    with pytest.raises(RuntimeError, match='Unexpected key.*"extra"'):
        copy.deepcopy(layer).load_state_dict(tensors | {"extra": torch.ones(1)})
    assert same(layer.storage, before)


def test_a_plain_weight_is_quantized_on_load(quantizer):
    linear = nn.Linear(64, 8)
    layer = QuantLinear(64, 8, quantizer=quantizer)
    outcome = layer.load_state_dict(linear.state_dict())
    assert not outcome.missing_keys and not outcome.unexpected_keys
    assert same(layer.storage, quantizer.quantize(linear.weight))


@pytest.mark.parametrize("variant", variants(), ids=label)
def test_a_model_trains_merges_saves_and_reloads(variant, tmp_path):
    model = nn.Sequential(nn.Linear(33, 48), nn.Tanh(), nn.Linear(48, 5))
    model = lowrank.quantize(model, make(variant))
    fresh = copy.deepcopy(model)
    config = lowrank.LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear")
    lowrank.inject(model, config)
    frozen = copy.deepcopy([layer.base_layer.storage for layer in (model[0], model[2])])
    x, target = torch.randn(64, 33), torch.randn(64, 5)
    losses = train(model, lambda: nn.functional.mse_loss(model(x), target), 12, 2e-2)
    assert losses[-1] < 0.8 * losses[0]
    now = [layer.base_layer.storage for layer in (model[0], model[2])]
    assert all(same(a, b) for a, b in zip(now, frozen, strict=True))
    lowrank.save_adapter(model, tmp_path)
    lowrank.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    assert_merges_and_back(model, x)
