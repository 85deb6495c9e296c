"""Scaling and disabling mean the same for every method and every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig
from lowrank.adapters import names
from lowrank.errors import ConfigError, TargetError
from lowrank.surgery.targets import adapted_layers
from tests.surgery.models import refused


class Every(nn.Module):
    """A layer of each kind that adapters are for."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(ids).mT).mT
        return self.linear(x + self.attention(x, x, x)[0])


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """W + ΔW of each layer, as merging makes it."""
    lowrank.merge(model)
    found = {n: m.base_layer for n, m in adapted_layers(model).items()}
    merged = {
        f"{n}.{k}": p.detach().clone()
        for n, base in found.items()
        for k, p in base.named_parameters(recurse=False)
    }
    lowrank.unmerge(model)
    return merged


@torch.no_grad()
@pytest.mark.parametrize("method", names())
def test_scaling_and_disabling(generator, method):
    targets = ["linear"] if method == "dora" else ["table", "conv", "attention", "linear"]
    model, ids = Every().double().eval(), torch.randint(11, (2, 5), generator=generator)
    base = model(ids)
    config = LoRAConfig(
        r=2, lora_alpha=3, method=method, target_modules=targets, init_lora_weights=False
    )
    lowrank.inject(model, config)
    for layer in adapted_layers(model).values():
        for tensor in layer.tensors("default").values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    once, ones = model(ids), weights(model)
    lowrank.scale_adapter(model, "default", 0.0)
    zeros = weights(model)
    for _ in range(2):  # never cumulative
        lowrank.scale_adapter(model, "default", 1.5)
    if method != "dora":  # whose magnitude divides by what grows with s
        for name, weight in weights(model).items():
            wanted = zeros[name] + 1.5 * (ones[name] - zeros[name])
            torch.testing.assert_close(weight, wanted)
    scaled = model(ids)
    assert not torch.allclose(scaled, once)
    with lowrank.disable_adapters(model):
        torch.testing.assert_close(model(ids), base)
    lowrank.disable_adapters(model)
    torch.testing.assert_close(model(ids), base)
    lowrank.enable_adapters(model)
    assert torch.equal(model(ids), scaled)
    lowrank.scale_adapter(model, "default", 1.0)
    torch.testing.assert_close(model(ids), once)
    lowrank.delete_adapter(model, "default")  # the active one
    torch.testing.assert_close(model(ids), base)
    assert not any(layer.active_adapters for layer in adapted_layers(model).values())


def test_several_names_sum_and_refusals_leave_all_as_it_was():
    model = Every().eval()
    for adapter in ("first", "second"):
        lowrank.inject(model, LoRAConfig(r=2, target_modules=["linear", "conv"]), adapter=adapter)
    lowrank.set_adapter(model, ["first", "second"])
    for call, error in (
        (lambda: lowrank.set_adapter(model, ["first", "third"]), TargetError),
        (lambda: lowrank.delete_adapter(model, "third"), TargetError),
        (lambda: lowrank.scale_adapter(model, "third", 2.0), TargetError),
        (lambda: lowrank.scale_adapter(model, "first", float("nan")), ConfigError),
        (lambda: lowrank.scale_adapter(model, "first", float("inf")), ConfigError),
        (lambda: lowrank.scale_adapter(model, "first", "2"), ConfigError),
        (
            lambda: lowrank.inject(model, LoRAConfig(target_modules=["linear"]), "first"),
            ConfigError,
        ),
    ):
        with refused(model, error):
            call()
    assert model.linear.active_adapters == ["first", "second"]
    lowrank.delete_adapter(model, "first")
    assert model.linear.active_adapters == ["second"]
