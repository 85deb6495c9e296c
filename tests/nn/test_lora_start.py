"""LoRALinear whose adapter starts with a part of the weight, over every scheme."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig, LoRALinear, QuantLinear
from lowrank.errors import ConfigError, FileFormatError, ShapeError, TargetError, WeightError
from tests.ops.oracle import assert_near, lora
from tests.quant.schemes import label, make, same, variants

STARTS = ["loftq", "pissa", "pissa_niter_2"]
K, N = 123, 40


def config(init="loftq", **options) -> LoRAConfig:
    return LoRAConfig(**{"r": 8, "lora_alpha": 20, "init_lora_weights": init, **options})


def parts(layer: LoRALinear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.base_layer.dequantize(torch.float64), A, B, layer.scaling["default"]


def effective(layer: LoRALinear) -> torch.Tensor:
    Q, A, B, s = parts(layer)
    return (Q + s * B.double() @ A.double()).detach()


@pytest.mark.parametrize("variant", variants(block_size=32), ids=label)
@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_output_gradients_and_merge_are_those_of_the_sum(init, variant):
    quantizer, linear = make(variant), nn.Linear(K, N)
    layer = LoRALinear.wrap(linear, config(init), quantizer=quantizer)
    plain = QuantLinear.from_linear(linear, quantizer).dequantize(torch.float64)
    W = linear.weight.double()
    assert (W - effective(layer)).norm() < (W - plain).norm() + 1e-6 * W.norm()

    x, dy = torch.randn(7, K, requires_grad=True), torch.randn(7, N)
    Q, A, B, s = parts(layer)
    y = layer(x)
    got = (y, *torch.autograd.grad(y, (x, A, B), dy))
    assert_near(got, lora, (x, Q, linear.bias, A, B, torch.tensor(s), dy), 3e-6)
    merged = effective(layer)
    layer.merge()
    torch.testing.assert_close(layer.weight.double(), merged, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", STARTS)
def test_the_linear_that_is_wrapped_stays_as_it_is(init):
    linear = nn.Linear(K, N)
    before = copy.deepcopy(linear.state_dict())
    layer = LoRALinear.wrap(linear, config(init), quantizer="nf4")
    assert torch.equal(linear.weight, before["weight"]) and layer.bias is linear.bias
    assert layer.config["default"].init_lora_weights == init
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_weight_starts_the_adapter_anew(init, dtype):
    linear = nn.Linear(K, N, dtype=dtype)
    wrapped = LoRALinear.wrap(linear, config(init), quantizer="nf4")
    layer = LoRALinear(K, N, config=config(init), quantizer="nf4", dtype=dtype)
    outcome = layer.load_state_dict(linear.state_dict())
    assert not outcome.missing_keys and not outcome.unexpected_keys
    with torch.device("meta"):
        empty = LoRALinear(K, N, config=config(init), quantizer="nf4", dtype=dtype)
    empty.load_state_dict(linear.state_dict(), assign=True)
    for other in (layer, empty):
        assert same(other.base_layer.storage, wrapped.base_layer.storage)
        assert other.base_layer.weight_dtype == dtype
        for part in ("lora_A", "lora_B"):
            mine, theirs = (getattr(one, part)["default"].weight for one in (other, wrapped))
            assert torch.equal(mine, theirs) and mine.dtype == torch.float32
    # beside a trained adapter, the plain weight makes its base again
    trained = {name: p + 1 for name, p in layer.named_parameters() if name.startswith("lora_")}
    layer.load_state_dict({**linear.state_dict(), **trained})
    assert same(layer.base_layer.storage, wrapped.base_layer.storage)
    assert torch.equal(layer.lora_A["default"].weight, trained["lora_A.default.weight"])
    # and its own state dict is taken as it is
    again = LoRALinear(K, N, config=config(init), quantizer="nf4", dtype=dtype)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, K, dtype=dtype)
    assert torch.equal(again(x), layer(x))


def test_in_a_model_keys_have_prefixes():
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, 8))
    twin = nn.Sequential(
        LoRALinear(K, N, config=config(), quantizer="nf4"),
        LoRALinear(N, 8, config=config(lora_alpha=3), quantizer="int8"),
    )
    twin.load_state_dict(model.state_dict())
    for linear, layer in zip(model, twin, strict=True):
        wrapped = LoRALinear.wrap(
            linear, layer.config["default"], quantizer=layer.base_layer.quantizer
        )
        assert torch.equal(effective(layer), effective(wrapped))
    bad = model.state_dict() | {"1.weight": torch.full((8, N), float("inf"))}
    with pytest.raises(WeightError, match=r"1\.weight: expected finite values; .* in row 0"):
        twin.load_state_dict(bad)
    with pytest.raises(ShapeError, match=r"1\.weight: expected \[8, 40\]; got \[8, 41\]"):
        twin.load_state_dict(model.state_dict() | {"1.weight": torch.randn(8, 41)})


def test_what_has_no_original_weight_is_refused():
    linear, quantized = nn.Linear(K, N), QuantLinear(K, N)
    with pytest.raises(ConfigError, match="expected an nn.Linear and a quantizer; .*'nf4'"):
        LoRALinear.wrap(quantized, config())
    with pytest.raises(ConfigError, match="got Linear and None; pass quantizer='nf4'"):
        LoRALinear.wrap(linear, config())
    with pytest.raises(ConfigError, match="got Linear and None; pass quantizer='nf4'"):
        LoRALinear(K, N, config=config())
    with pytest.raises(TargetError, match="nn.Linear or Conv1D to quantize; got QuantLinear"):
        LoRALinear.wrap(quantized, LoRAConfig(), quantizer="nf4")
    layer = LoRALinear.wrap(linear, config(), quantizer="nf4")
    with pytest.raises(ConfigError, match="changes the base, so it is for a first adapter only"):
        layer.add_adapter("b", config())
    with pytest.raises(
        FileFormatError, match="expected the original in floats.*got a quantized one"
    ):
        layer.load_state_dict(quantized.state_dict())
    with pytest.raises(ConfigError, match="lora_alpha: expected a number other than 0"):
        LoRALinear.wrap(linear, config(lora_alpha=0), quantizer="nf4")
    with pytest.raises(
        WeightError, match="weight: expected finite values; got NaN or inf in row 2"
    ):
        linear.weight.data[2, 3] = float("nan")
        LoRALinear.wrap(linear, config(), quantizer="nf4")


@pytest.mark.parametrize("init", STARTS)
def test_rank_beyond_the_weights_and_a_weight_of_zeros(init):
    for weight in (torch.randn(6, 33), torch.zeros(6, 33)):
        linear = nn.Linear(33, 6)
        linear.weight.data = weight
        layer = LoRALinear.wrap(linear, config(init, r=16), quantizer="nf4")
        x = torch.randn(5, 33)
        plain = QuantLinear.from_linear(linear, "nf4").dequantize()
        assert (effective(layer) - weight).norm() <= (plain - weight).norm() + 1e-5
        assert (layer(x) - x @ effective(layer).float().T - linear.bias).norm() < 1e-4
        for _ in range(2):  # every direction learns: A too, once B has
            layer(x).square().sum().backward()
            with torch.no_grad():
                for part in (layer.lora_A, layer.lora_B):
                    part["default"].weight -= 1e-3 * part["default"].weight.grad
        assert (layer.lora_A["default"].weight.grad.norm(dim=1) > 0).all()
        assert (layer.lora_B["default"].weight.grad.norm(dim=0) > 0).all()


def test_rank_stabilized_and_pattern_scales():
    linear = nn.Linear(K, N)
    wanted = effective(LoRALinear.wrap(linear, config(lora_alpha=8), quantizer="nf4"))
    for options in ({"use_rslora": True}, {"alpha_pattern": {"up": 100}}, {"lora_alpha": -3.0}):
        layer = LoRALinear.wrap(linear, config(**options), name="block.up", quantizer="nf4")
        torch.testing.assert_close(effective(layer), wanted, rtol=1e-5, atol=1e-6)
    layer = LoRALinear.wrap(
        linear, config(rank_pattern={"up": 3}), name="block.up", quantizer="nf4"
    )
    assert layer.lora_A["default"].weight.shape == (3, K)


def test_a_deep_copy_is_whole():
    model = nn.Sequential(LoRALinear(K, N, config=config(), quantizer="nf4"))
    x = torch.randn(3, K)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert lowrank.count_parameters(model)[0] == 8 * (K + N)
