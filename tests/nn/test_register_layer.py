"""A layer of a user's own class, through one registration."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from lowrank import LoRAConfig, LoRALinear
from lowrank.errors import ConfigError, TargetError
from lowrank.nn.kinds import kind_of
from lowrank.nn.lora_conv import LoRAConv


class MyLinear(nn.Module):
    """y = x Wᵀ + b, and no subclass of nn.Linear."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.randn(out_features))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.linear(x, self.weight, self.bias)


class SameConv2d(nn.Conv2d):
    """A convolution that pads by itself, as TensorFlow does."""

    def pad(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pad(x))


class LoRASameConv2d(LoRAConv):
    """The same with adapters: their A pads so, too."""

    @classmethod
    def check_forward(cls, base: nn.Module, kind: type[nn.Module], name: str) -> None:
        """It computes what is expected."""

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().convolve(self.unmerged_base.pad(x), weight)


def test_a_linear_class_needs_no_more_than_its_name():
    plain = nn.Sequential(MyLinear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(TargetError, match="see lowrank.register_layer"):
        lowrank.inject(copy.deepcopy(plain), LoRAConfig(target_modules=["0"]))
    lowrank.register_layer(MyLinear, LoRALinear)
    model = copy.deepcopy(plain)
    config = LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    lowrank.inject(model, config)
    assert {name for name, m in model.named_modules() if isinstance(m, LoRALinear)} == {"0", "2"}
    x = torch.randn(7, 5)
    y = model(x)
    assert model[0].base_layer.calls == 1 and not torch.allclose(y, plain(x))
    y.sum().backward()
    with lowrank.disable_adapters(model):
        assert torch.equal(model(x), plain(x))
    lowrank.merge_and_unload(model)
    assert type(model[0]) is MyLinear and type(model[2]) is nn.Linear
    torch.testing.assert_close(model(x), y)


def test_another_kind_of_convolution():
    model = nn.Sequential(SameConv2d(3, 4, 2))
    config = LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False)
    with pytest.raises(TargetError, match="SameConv2d, which computes something else"):
        lowrank.inject(model, config)
    lowrank.register_layer(SameConv2d, LoRASameConv2d)
    lowrank.inject(model, config)
    x = torch.randn(2, 3, 6, 6)
    y = model(x)
    assert y.shape == (2, 4, 6, 6)
    lowrank.merge_and_unload(model)
    assert type(model[0]) is SameConv2d
    torch.testing.assert_close(model(x), y)


def test_what_cannot_be_registered_and_what_is_no_linear():
    for base, adapted in ((MyLinear(2, 2), LoRALinear), (MyLinear, nn.Linear), ("x", LoRALinear)):
        with pytest.raises(ConfigError, match="expected a subclass of"):
            lowrank.register_layer(base, adapted)
    with pytest.raises(TargetError, match="expected a linear layer"):
        LoRALinear.wrap(nn.LayerNorm(4), LoRAConfig())
    assert kind_of(nn.LayerNorm(4)) is None
