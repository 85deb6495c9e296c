"""An adapter from the difference of two models."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import ConfigError, DtypeError, ShapeError, TargetError, WeightError
from tests.adapters.oracle import tiny_llama, words
from tests.surgery.models import assert_unchanged, state

CONFIG = {"r": 6, "lora_alpha": 9, "target_modules": "all-linear"}


def tuned_by_lora(model: nn.Module, **options) -> nn.Module:
    tuned = copy.deepcopy(model)
    lowrank.inject(tuned, LoRAConfig(**{**CONFIG, "init_lora_weights": False, **options}))
    return lowrank.merge_and_unload(tuned)


def test_a_difference_of_that_rank_is_found_whole(generator):
    model = tiny_llama()
    tuned = tuned_by_lora(model, r=4)
    report = lowrank.extract_adapter(model, tuned.state_dict(), LoRAConfig(**CONFIG))
    assert report.kept == pytest.approx(1, abs=1e-5) and report.left_out == ()
    assert len(report.layers) == 14 and "14 layers: 100.00%" in str(report)
    ids = words(generator)
    with torch.no_grad():
        expected, got = tuned(ids).logits, model(ids).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        lowrank.set_adapter(model, [])
        assert (model(ids).logits - expected).norm() > 1e-3 * expected.norm()


def test_of_a_full_difference_the_largest_parts_are_kept():
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 50))
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for layer in tuned:
            layer.weight.add_(torch.randn_like(layer.weight), alpha=0.1)
    differences = [t.weight.double() - m.weight.double() for t, m in zip(tuned, model, strict=True)]
    pattern = {"rank_pattern": {"1": 11}, "alpha_pattern": {"1": 3}}
    config = LoRAConfig(**CONFIG, **pattern, use_rslora=True)
    report = lowrank.extract_adapter(model, tuned.state_dict(), config)
    kept = size = 0.0
    for layer, row, difference, r in zip(model, report.layers, differences, (6, 11), strict=True):
        U, S, V = torch.linalg.svd(difference, full_matrices=False)
        nearest = U[:, :r] * S[:r] @ V[:r]
        A, B = layer.factors("default")
        got = layer.scaling["default"] * B.double() @ A.double()
        assert (got - nearest).norm() <= 1e-5 * nearest.norm()
        assert row.size == pytest.approx(S.square().sum().item(), rel=1e-5)
        assert row.kept == pytest.approx((S[:r].square().sum() / S.square().sum()).item(), rel=1e-5)
        kept, size = kept + S[:r].square().sum().item(), size + S.square().sum().item()
    assert report.kept == pytest.approx(kept / size, rel=1e-5)


def test_over_a_quantized_model_the_adapter_has_what_quantizing_lost_too():
    model = nn.Sequential(nn.Linear(64, 48))
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned[0].weight.add_(torch.outer(torch.randn(48), torch.randn(64)), alpha=0.05)
    lowrank.quantize(model, "nf4")
    base = model[0].dequantize()
    lowrank.extract_adapter(model, tuned.state_dict(), LoRAConfig(**CONFIG))
    weight = tuned[0].weight.detach().double()
    S = torch.linalg.svdvals(weight - base.double())
    lost = lowrank.merge_and_unload(model)[0].weight.double() - weight
    assert lost.norm().item() == pytest.approx(S[6:].norm().item(), rel=1e-4)


def test_from_files_into_files(tmp_path, generator):
    model = tiny_llama()
    tuned = tuned_by_lora(model)
    tensors = {name: tensor.contiguous() for name, tensor in tuned.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    tuned.config.save_pretrained(tmp_path)
    other = copy.deepcopy(model)
    lowrank.extract_adapter(model, lowrank.open_weights(tmp_path), LoRAConfig(**CONFIG))
    lowrank.save_adapter(model, tmp_path / "adapter")
    lowrank.load_adapter(other, tmp_path / "adapter")
    ids = words(generator)
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, tuned(ids).logits, rtol=1e-4, atol=1e-5)


def test_what_differs_elsewhere_is_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned[1].weight.add_(1)
        tuned[2].weight.add_(1)
        tuned[0].weight.add_(1)
    config = LoRAConfig(r=2, target_modules=["0"])
    report = lowrank.extract_adapter(model, tuned.state_dict(), config)
    assert report.left_out == ("1.weight", "2.weight")
    assert "left out, for they differ but are no targets: 1.weight, 2.weight" in str(report)


def test_refusals_leave_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4), nn.Embedding(5, 3))
    good = {k: v + 0.1 for k, v in model.state_dict().items()}
    before = state(model)
    nan = good["1.weight"].clone().index_fill(0, torch.tensor([2]), float("nan"))
    plain = LoRAConfig(**CONFIG)
    for weights, config, error, message in [
        ({}, plain, ConfigError, "weights: expected 0.weight among them; it is missing"),
        ({**good, "1.weight": nan}, plain, WeightError, "1.weight: expected finite values"),
        (
            {**good, "1.weight": torch.zeros(4, 7)},
            plain,
            ShapeError,
            r"1.weight: expected \[4, 6\]",
        ),
        ({**good, "1.weight": torch.zeros(4, 6).int()}, plain, DtypeError, "1.weight: expected"),
        (model, plain, ConfigError, "weights: expected tensors by their names.*got Sequential"),
        (good, 4, ConfigError, "config: expected a LoRAConfig; got int"),
        (good, LoRAConfig(target_modules=["2"]), TargetError, "2"),
        (good, LoRAConfig(target_modules=["nothing"]), TargetError, "matches nothing"),
        (good, LoRAConfig(**CONFIG, target_rows={"1": [(0, 2)]}), ConfigError, "target_rows"),
        (good, LoRAConfig(**CONFIG, init_lora_weights="pissa"), ConfigError, "a start of its own"),
    ]:
        with pytest.raises(error, match=message):
            lowrank.extract_adapter(model, weights, config)
        assert_unchanged(model, before)
    lowrank.inject(model, plain)
    before = state(model)
    with pytest.raises(TargetError, match="expected a linear layer without adapters"):
        lowrank.extract_adapter(model, good, plain, adapter="other")
    assert_unchanged(model, before)
