"""Merging into weights that stay quantized, and what is left of the adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lowrank
from lowrank import LoRAConfig, QuantLinear, quant
from lowrank.errors import ConfigError, ShapeError, TargetError, WeightError
from tests.quant.schemes import label, variants
from tests.surgery.models import assert_unchanged, state

SHAPES = [(96, 123), (40, 96)]  # N, K


def adapted(quantizer, r=8, size=0.01, adapters=("default",)) -> nn.Sequential:
    """Two quantized layers with adapters of about `size` times the weight, as training leaves."""
    layers = [QuantLinear(K, N, quantizer=quantizer) for N, K in SHAPES]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    for adapter in adapters:
        lowrank.inject(
            model, LoRAConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"), adapter
        )
        for layer in (model[0], model[2]):
            A, B = layer.factors(adapter)
            with torch.no_grad():  # singular values that fall, as those of a trained adapter do
                B.normal_()
                B.mul_(0.5 ** torch.arange(r))
                weight = layer.base_layer.dequantize()
                B.mul_(size * weight.norm() / (2 * B @ A).norm())
    return model


def change(model: nn.Module, before: list[torch.Tensor]) -> list[torch.Tensor]:
    """What each layer computes beyond the weight it had, densely."""
    dense = lowrank.merge_and_unload(copy.deepcopy(model))
    return [dense[i].weight.double() - w.double() for i, w in zip((0, 2), before, strict=True)]


@pytest.mark.parametrize("variant", variants(), ids=label)
def test_the_report_tells_what_each_layer_holds(variant):
    name, options = variant
    model = adapted(quant.get(name, **options))
    before = [model[i].base_layer.dequantize() for i in (0, 2)]
    wanted = change(model, before)
    rounded = [
        QuantLinear.from_linear(layer, quant.get(name, **options)).dequantize()
        for layer in (lowrank.merge_and_unload(copy.deepcopy(model))[i] for i in (0, 2))
    ]
    report = lowrank.merge_quantized(model)
    assert [layer.name for layer in report.layers] == ["0", "2"] and report.residual == "default"
    for row, got, want, anew, old in zip(
        report.layers, change(model, before), wanted, rounded, before, strict=True
    ):
        assert row.rank == 4
        size = want.square().sum()
        assert row.size == pytest.approx(size.item(), rel=1e-3)
        anew = anew.double() - old.double()
        for told, made in ((row.kept, got), (row.rounded, anew)):
            assert told.share == pytest.approx(((made * want).sum() / size).item(), abs=2e-3)
            assert told.error == pytest.approx(
                ((made - want).norm() / size.sqrt()).item(), abs=2e-3
            )
        # at most what the nearest matrix of rank 4 leaves, of a ΔW of rank 8
        lost = torch.linalg.svdvals(want)[4:].norm()
        assert (got - want).norm() <= 1.01 * lost and row.kept.share > 0.98


def test_rounding_loses_what_the_residual_keeps():
    report = lowrank.merge_quantized(adapted("nf4", size=0.003))
    assert report.rounded.share < 0.15 and report.refitted.share < 0.15
    assert report.kept.share > 0.98 and report.kept.error < 0.1
    text = str(report)
    assert f"{report.kept.share:.2%}" in text and "rank 4" in text and "'default'" in text
    worst = max(report.layers, key=lambda layer: layer.kept.error)
    assert f"{worst.kept.error:.2%}  its worst layer, {worst.name}" in text


def test_what_is_left_is_a_quantized_model_with_a_small_adapter():
    model = adapted("nf4").train()
    options = model[0].base_layer.storage.options
    lowrank.merge_quantized(model, residual_rank=3, into="rest")
    for i in (0, 2):
        assert type(model[i].base_layer) is QuantLinear and list(model[i].config) == ["rest"]
        assert model[i].base_layer.storage.options == options
        assert model[i].r == {"rest": 3} and model[i].scaling == {"rest": 1.0}
        assert model[i].training and model[i].active_adapters == ["rest"]
    assert not any(p.requires_grad for p in model.parameters())


def test_without_a_residual_no_adapter_is_left():
    model = adapted("nf4", size=0.3)
    before = [model[i].base_layer.dequantize() for i in (0, 2)]
    wanted = change(model, before)
    report = lowrank.merge_quantized(model, residual_rank=0)
    assert report.residual is None and "adapter" not in str(report).splitlines()[-2]
    for i, row, want, old in zip((0, 2), report.layers, wanted, before, strict=True):
        assert type(model[i]) is QuantLinear and row.kept == row.refitted and row.kept.share > 0.8
        got = model[i].dequantize().double() - old.double()
        anew = quant.get("nf4").quantize((old + want).float())
        error = quant.get("nf4").dequantize(anew).double() - old - want
        assert (got - want).norm() <= error.norm() * (1 + 1e-6)


def test_several_adapters_their_scales_and_ranks():
    model = adapted("nf4", adapters=("a", "b"))
    lowrank.scale_adapter(model, "b", -0.5)
    before = [model[i].base_layer.dequantize() for i in (0, 2)]
    lowrank.set_adapter(model, ["a", "b"])
    wanted = change(model, before)
    report = lowrank.merge_quantized(model, ["a", "b"])
    assert {layer.rank for layer in report.layers} == {8}
    for got, want in zip(change(model, before), wanted, strict=True):
        assert (got - want).norm() <= 1.01 * torch.linalg.svdvals(want)[8:].norm()


def test_layers_that_are_dense_or_without_adapters():
    model = nn.Sequential(nn.Linear(64, 32), QuantLinear(32, 48), QuantLinear(48, 8))
    lowrank.inject(model, LoRAConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    wanted = lowrank.merge_and_unload(copy.deepcopy(model))
    other = state(model[2])
    report = lowrank.merge_quantized(model)
    assert [layer.name for layer in report.layers] == ["1"]
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, wanted[0].weight)
    assert model[1].r == {"default": 1}
    assert_unchanged(model[2], other)


def test_conv1d_and_modules_that_train_whole():
    model = nn.Sequential(Conv1D(40, 64), nn.Linear(40, 6))
    with torch.no_grad():
        model[0].weight.normal_()
    lowrank.quantize(model, "nf4", skip=["1"])
    config = LoRAConfig(r=4, target_modules=["0"], modules_to_save=["1"], init_lora_weights=False)
    lowrank.inject(model, config)
    with torch.no_grad():
        for parameter in model[0].lora_B.parameters():
            parameter.mul_(0.1)
        for parameter in model[1].parameters():
            parameter.add_(0.5)
    x = torch.randn(7, 64)
    with torch.no_grad():
        expected = model(x)
        report = lowrank.merge_quantized(model, residual_rank=4)
        got = model(x)
    assert report.kept.share > 0.99 and report.kept.error < 0.02
    assert (got - expected).norm() < 0.02 * expected.norm()
    assert type(model[1]) is nn.Linear


def test_a_head_that_shares_its_codes_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(32, 64), nn.Linear(64, 32, bias=False)
            self.head.weight = self.table.weight

    model = lowrank.quantize(Tied(), "nf4", skip=[], embeddings=True)
    lowrank.inject(model, LoRAConfig(r=2, target_modules=["head"]))
    before = state(model)
    with pytest.raises(ConfigError, match="head: shares its codes with table"):
        lowrank.merge_quantized(model)
    assert_unchanged(model, before)


def test_an_adapter_that_changes_nothing_leaves_every_bit():
    model = nn.Sequential(QuantLinear(64, 32))
    lowrank.inject(model, LoRAConfig(r=4, target_modules="all-linear"))
    before = state(model[0].base_layer)
    report = lowrank.merge_quantized(model)
    assert_unchanged(model[0].base_layer, before)
    assert report.kept.share == 1.0 and report.kept.error == 0.0


def test_saves_and_reloads(tmp_path):
    model = adapted("nf4")
    lowrank.merge_quantized(model)
    x = torch.randn(5, 123)
    y = model(x)
    lowrank.save_adapter(model, tmp_path / "rest")
    lowrank.unload(model)
    lowrank.save_quantized(model, tmp_path / "base")
    fresh = nn.Sequential(nn.Linear(123, 96), nn.Tanh(), nn.Linear(96, 40))
    lowrank.load_quantized(fresh, tmp_path / "base")
    lowrank.load_adapter(fresh, tmp_path / "rest")
    assert torch.equal(fresh(x), y)


def test_refusals_leave_the_model_as_it_was():
    model = adapted("nf4")
    before = state(model)
    for options, error, words in [
        ({"residual_rank": -1}, ConfigError, "residual_rank: expected None or at least 0; got -1"),
        ({"residual_rank": 2.0}, ConfigError, "residual_rank"),
        ({"adapters": ["other"]}, TargetError, "adapter 'other': no layer has it"),
        ({"into": "a.b"}, ConfigError, "adapter: expected a name without dots; got 'a.b'"),
    ]:
        with pytest.raises(error, match=words):
            lowrank.merge_quantized(model, **options)
        assert_unchanged(model, before)
    with torch.no_grad():
        model[2].lora_B["default"].weight[3, 1] = float("nan")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(WeightError, match="2: merged weight"):
        lowrank.merge_quantized(model)
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(TargetError, match="no layer of the model has adapters"):
        lowrank.merge_quantized(nn.Sequential(QuantLinear(32, 8)))
    dense = nn.Sequential(nn.Linear(8, 8))
    lowrank.inject(dense, LoRAConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ConfigError, match="merge_and_unload is for dense ones"):
        lowrank.merge_quantized(dense)
    model = adapted("nf4")
    lowrank.merge(model)
    with pytest.raises(ConfigError, match="merge_quantized: expected unmerged layers"):
        lowrank.merge_quantized(model)


@pytest.mark.parametrize("variant", variants(), ids=label)
def test_refit_is_never_farther_than_quantizing_anew_or_not_at_all(variant):
    name, options = variant
    quantizer = quant.get(name, **options)
    for N, K in ((1, 1), (5, 63), (33, 300)):
        weight = torch.randn(N, K)
        storage = quantizer.quantize(weight)
        for size in (0.0, 0.01, 0.3):
            target = quantizer.dequantize(storage, torch.float32) + size * torch.randn(N, K)
            moved = quant.refit(quantizer, storage, target)
            assert moved.options == storage.options and moved.scheme == storage.scheme
            errors = [
                (quantizer.dequantize(s, torch.float32) - target).norm()
                for s in (moved, quantizer.quantize(target), storage)
            ]
            assert errors[0] <= min(errors[1:]), (N, K, size)


def test_refit_finds_the_codes_and_scales_of_a_weight_that_has_them():
    quantizer = quant.get("nf4", block_size=32, double_quant=False)
    storage = quantizer.quantize(torch.randn(16, 96))
    # scaled, every block is still one of the codebook: but its largest need not be its absmax
    scales = torch.rand(16, 3) + 0.5
    target = quantizer.dequantize(storage) * scales.repeat_interleave(32, dim=1) * 0.7
    moved = quantizer.dequantize(quant.refit(quantizer, storage, target))
    torch.testing.assert_close(moved, target, rtol=1e-5, atol=1e-6)


def test_refit_refuses_another_shape():
    quantizer = quant.get("nf4")
    with pytest.raises(ShapeError, match=r"weight: expected \[4, 64\]; got \[64, 4\]"):
        quant.refit(quantizer, quantizer.quantize(torch.randn(4, 64)), torch.randn(64, 4))
