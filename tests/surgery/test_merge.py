"""Merging and unmerging, against PEFT and over quantized bases."""

from __future__ import annotations

import pytest
import torch

import lowrank
from lowrank import LoRAConfig, LoRALinear, QuantLinear
from lowrank.errors import ConfigError, TargetError, WeightError
from tests.adapters.oracle import peft_model, tiny_llama, words
from tests.surgery.models import assert_unchanged, names_of, state, two_adapters
from tests.surgery.training import train

PATTERNS = {
    "rank_pattern": {"q_proj": 3, r"layers\.1\..*": 5},
    "alpha_pattern": {"up_proj": 2.5},
}


@pytest.mark.parametrize("options", [{}, PATTERNS, {"use_rslora": True}])
def test_logits_gradients_and_merge_are_pefts(options, generator):
    model = tiny_llama().double()  # where gradients cancel, float32 sums in another order differ
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}
    options["init_lora_weights"] = False
    theirs = peft_model(model, **options)
    lowrank.inject(model, LoRAConfig(**options))
    model.load_state_dict(theirs.base_model.model.state_dict())
    ids = words(generator)
    for one in (model, theirs):
        one.train()
        one(input_ids=ids, labels=ids).loss.backward()
        one.eval()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads
    for name, grad in grads.items():
        want = theirs.base_model.model.get_parameter(name).grad
        assert (grad - want).norm() <= 1e-9 * want.norm(), name
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-9, atol=1e-9)
        ours, merged = lowrank.merge_and_unload(model), theirs.merge_and_unload()
        assert ours.state_dict().keys() == merged.state_dict().keys()
        for name, weight in merged.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], weight)


@torch.no_grad()
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_keeps_the_answer_and_unmerge_every_bit(quantized, dtype, generator):
    model, ids = two_adapters().to(dtype), words(generator)
    if quantized:
        lowrank.quantize(model, "nf4")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with lowrank.disable_adapters(model):
        base = model(ids).logits
    for chosen in (["a"], ["a", "b"]):
        lowrank.set_adapter(model, chosen)
        adapted = model(ids).logits
        lowrank.merge(model)
        gap = (adapted - base).float().norm()
        tolerance = 1e-5 if dtype == torch.float32 else 0.2
        assert (model(ids).logits - adapted).float().norm() < tolerance * gap
        with lowrank.disable_adapters(model):
            assert torch.equal(model(ids).logits, base)
        lowrank.unmerge(model)
        assert torch.equal(model(ids).logits, adapted)
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_adapter_survives_merging_over_a_quantized_base(dtype, generator):
    model, ids = lowrank.quantize(tiny_llama(), "nf4"), words(generator, batch=8)
    lowrank.inject(model, LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear"))

    def loss():
        return model(input_ids=ids, labels=ids).loss

    first, last = train(model, loss, 30, 1e-2)[0], loss().item()
    assert last < first - 0.3
    assert lowrank.merge_and_unload(model, dtype=dtype) is model
    assert not names_of(model, LoRALinear) and not names_of(model, QuantLinear)
    if dtype == torch.float32:
        assert abs(loss().item() - last) < 1e-5
    else:
        assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype
        model.to(dtype)
        assert abs(loss().item() - last) < 0.05 * (first - last)


def test_merging_a_broken_adapter_changes_nothing():
    model = two_adapters()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.lora_B["a"].weight[0, 0] = float("nan")
    modules = [n for n, _ in model.named_modules()]
    weights = [p for p in model.parameters()]
    with pytest.raises(WeightError, match=r"model\.layers\.1\.self_attn\.v_proj"):
        lowrank.merge(model)
    assert [n for n, _ in model.named_modules()] == modules
    assert all(p is q for p, q in zip(model.parameters(), weights, strict=True))


def test_merge_and_unload_unties_a_tied_head(generator):
    model, ids = tiny_llama(), words(generator)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    lowrank.inject(model, LoRAConfig(target_modules=["lm_head"], init_lora_weights=False))
    with torch.no_grad():
        want, embedding = model(ids).logits, model.model.embed_tokens.weight.clone()
        lowrank.merge_and_unload(model)
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.config.tie_word_embeddings is False


def test_merged_models_refuse_edits():
    model = two_adapters()
    lowrank.merge(model)
    before = state(model)
    for act in (
        lambda: lowrank.set_adapter(model, "b"),
        lambda: lowrank.delete_adapter(model, "b"),
        lambda: lowrank.scale_adapter(model, "a", 2.0),
        lambda: lowrank.merge(model),
        lambda: lowrank.quantize(model),
        lambda: lowrank.inject(model, LoRAConfig(target_modules=["o_proj"]), adapter="c"),
    ):
        with pytest.raises(ConfigError, match="unmerge first"):
            act()
        assert_unchanged(model, before)


def test_merge_without_adapters():
    with pytest.raises(TargetError, match="inject or load one first"):
        lowrank.merge(tiny_llama())


def test_what_is_merged_already_cannot_be_merged_otherwise():
    model = two_adapters()
    lowrank.merge(model, ["a"])
    for choice in ({"adapters": ["b"]}, {"dtype": torch.float64}):
        with pytest.raises(ConfigError, match="merged already: call unmerge first"):
            lowrank.merge_and_unload(model, **choice)
    lowrank.merge_and_unload(model)
