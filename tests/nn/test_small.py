"""Few rows beside one adapter: torch's own calls give what the operator gives, and keep up."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig, LoRALinear, ops
from lowrank.errors import ShapeError


def layer(generator, **options) -> LoRALinear:
    linear = nn.Linear(63, 45)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    config = LoRAConfig(**{"r": 5, "lora_alpha": 7, "init_lora_weights": False, **options})
    return LoRALinear.wrap(linear, config)


def expected(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    """In float64, of what the layer holds now."""
    y = x.double() @ layer.base_layer.weight.double().T + layer.base_layer.bias.double()
    for a in layer.active_adapters:
        A, B = layer.lora_A[a].weight.double(), layer.lora_B[a].weight.double()
        y = y + layer.scaling[a] * (x.double() @ A.T @ B.T)
    return y


@pytest.mark.parametrize("shape", [(63,), (3, 63), (0, 63), (2, 3, 63), (2, 1, 2, 63), (2048, 63)])
def test_values_and_gradients_of_every_shape(generator, shape):
    lora = layer(generator)
    x = torch.randn(shape, generator=generator).requires_grad_()
    y = lora(x)
    torch.testing.assert_close(y, expected(lora, x).float(), rtol=1e-5, atol=1e-4)
    dy = torch.randn(y.shape, generator=generator)
    parts = [x, lora.lora_A["default"].weight, lora.lora_B["default"].weight]
    ours = torch.autograd.grad(y, parts, dy)
    wide = [part.detach().double().requires_grad_() for part in parts]
    base = lora.base_layer.weight.double()
    theirs = wide[0] @ base.T + lora.scaling["default"] * (wide[0] @ wide[1].T @ wide[2].T)
    for mine, its in zip(ours, torch.autograd.grad(theirs, wide, dy.double()), strict=True):
        torch.testing.assert_close(mine, its.float(), rtol=1e-4, atol=1e-3)


def test_what_a_layer_holds_may_change_between_calls(generator):
    lora = layer(generator)
    x = torch.randn(2, 3, 63, generator=generator)

    def assert_current():
        torch.testing.assert_close(lora(x), expected(lora, x).float(), rtol=1e-5, atol=1e-4)

    assert_current()
    lora.scaling["default"] *= 2
    assert_current()
    lora.lora_B["default"].weight = nn.Parameter(torch.randn(45, 5, generator=generator))
    assert_current()
    lora.load_state_dict({k: v + 1 for k, v in lora.state_dict().items()}, assign=True)
    assert_current()
    lora.base_layer = copy.deepcopy(lora.base_layer)
    lora.base_layer.weight.data.mul_(2)
    assert_current()
    lora.add_adapter("second", LoRAConfig(r=2, init_lora_weights=False))
    lora.set_adapter(["second"])
    assert_current()
    lora.delete_adapter("second")
    lora.add_adapter("second", LoRAConfig(r=3, init_lora_weights=False))
    lora.set_adapter(["second"])
    assert_current()
    lora.set_adapter(["default", "second"])
    assert_current()
    lora.set_adapter(["second"])
    twin = copy.deepcopy(lora)
    twin.lora_B["second"].weight.data.zero_()
    assert_current()
    torch.testing.assert_close(twin(x), twin.base_layer(x))
    lora.base_layer.register_forward_hook(lambda module, args, y: y + 1)
    torch.testing.assert_close(lora(x), expected(lora, x).float() + 1, rtol=1e-5, atol=1e-4)


def test_a_backend_asked_for_by_name_is_asked(generator):
    lora = layer(generator)
    x = torch.randn(2, 63, generator=generator)
    with torch.profiler.profile() as profile, ops.use_backend("reference"):
        lora(x)
    assert any(event.name == "lowrank::lora_linear" for event in profile.events())


def test_dropout_is_the_operators(generator):
    lora = layer(generator, lora_dropout=0.5).train()
    x = torch.randn(64, 63, generator=generator)
    assert not torch.equal(lora(x), lora(x))
    assert torch.equal(lora.eval()(x), lora(x))
    lora.lora_dropout["default"].train()  # as those do who sample with dropout
    assert not torch.equal(lora(x), lora(x))


def test_what_a_layer_is_told_between_calls_counts(generator):
    lora = layer(generator)
    x = torch.randn(2, 63, generator=generator)
    base, adapted = lora.base_layer(x), lora(x)
    assert not torch.allclose(base, adapted)
    lora.disabled = True
    assert torch.equal(lora(x), base)
    lora.disabled = False
    assert torch.equal(lora(x), adapted)
    lora.merge()
    torch.testing.assert_close(lora(x), adapted, rtol=1e-4, atol=1e-4)
    lora.unmerge()
    assert torch.equal(lora(x), adapted)
    with lowrank.adapter_rows(nn.Sequential(lora), [None, "default"]):
        torch.testing.assert_close(lora(x), torch.stack([base[0], adapted[1]]))
    assert torch.equal(lora(x), adapted)
    with pytest.raises(ShapeError, match="K=63"):
        lora(x[:, :-1])
    nn.utils.parametrize.register_parametrization(lora.base_layer, "weight", nn.Tanh())
    y = x.double() @ lora.base_layer.weight.double().T + lora.base_layer.bias.double()
    branch = (adapted - base).double()
    torch.testing.assert_close(lora(x), (y + branch).float(), rtol=1e-4, atol=1e-4)


def test_another_dtype_after_the_first_call(generator):
    lora = layer(generator)
    x = torch.randn(2, 63, generator=generator)
    y = lora(x)
    torch.testing.assert_close(lora.double()(x.double()), y.double(), rtol=1e-5, atol=1e-4)
    assert lora.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(generator)(x).dtype == torch.bfloat16


def test_a_further_adapters_dropout_follows_the_layer(generator):
    lora = layer(generator).eval()
    lora.add_adapter("second", LoRAConfig(r=2, lora_dropout=0.5, init_lora_weights=False))
    lora.set_adapter(["second"])
    x = torch.randn(64, 63, generator=generator)
    assert torch.equal(lora(x), lora(x))
    assert not torch.equal(lora.train()(x), lora(x))
    assert all(module.training for module in lora.modules())
    assert not any(module.training for module in lora.eval().modules())


def test_modules_that_are_replaced_from_outside(generator):
    """As `quantize` does under an adapter, and whoever sets an item of a ModuleDict."""
    lora, other = layer(generator), layer(generator)
    x = torch.randn(2, 63, generator=generator)
    lora(x)
    lora.register_module("base_layer", other.base_layer)
    for part in ("lora_A", "lora_B"):
        getattr(lora, part)["default"] = getattr(other, part)["default"]
    assert torch.equal(lora(x), other(x))


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_over_a_quantized_weight(generator, scheme, rows):
    linear = nn.Linear(63, 45)
    config = LoRAConfig(r=5, lora_alpha=7, init_lora_weights=False)
    lora = LoRALinear.wrap(linear, config, quantizer=scheme)
    x = torch.randn(rows, 1, 63, generator=generator)
    base = lora.base_layer.dequantize(torch.float64)
    A, B = (part["default"].weight.detach().double() for part in (lora.lora_A, lora.lora_B))
    wanted = x.double() @ base.T + lora.bias.double() + 7 / 5 * (x.double() @ A.T @ B.T)
    with torch.no_grad():
        torch.testing.assert_close(lora(x), wanted.float(), rtol=1e-4, atol=1e-4)
        with ops.use_backend("reference"):
            torch.testing.assert_close(lora(x), wanted.float(), rtol=1e-4, atol=1e-4)
        if scheme == "nf4":
            rounded = lora(x.bfloat16())
            torch.testing.assert_close(rounded.float(), wanted.float(), rtol=0.02, atol=0.2)
    y = lora(x)
    torch.testing.assert_close(y, wanted.float(), rtol=1e-4, atol=1e-4)
    assert y.requires_grad
