"""Activating, scaling, disabling and deleting adapters, against PEFT."""

from __future__ import annotations

import copy

import pytest
import torch

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import ConfigError
from tests.adapters.oracle import peft_model, tiny_llama, words
from tests.surgery.models import two_adapters


@torch.no_grad()
def test_switching_equals_peft(generator):
    import peft

    base, ids = tiny_llama(), words(generator)
    options = {"r": 3, "init_lora_weights": False}
    theirs = peft_model(base, "first", target_modules=["q_proj", "v_proj"], **options)
    theirs.add_adapter("second", peft.LoraConfig(target_modules=["v_proj", "up_proj"], **options))
    model = copy.deepcopy(base)
    lowrank.inject(
        model, LoRAConfig(target_modules=["q_proj", "v_proj"], **options), adapter="first"
    )
    lowrank.inject(
        model, LoRAConfig(target_modules=["v_proj", "up_proj"], **options), adapter="second"
    )
    model.load_state_dict(theirs.base_model.model.state_dict())

    def assert_equal():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
        wanted = {
            n.removeprefix("base_model.model."): p.requires_grad
            for n, p in theirs.named_parameters()
        }
        assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted

    assert_equal()
    for active in ("second", "first", ["first", "second"]):
        lowrank.set_adapter(model, active)
        theirs.base_model.set_adapter(active)
        assert_equal()
    theirs.base_model.set_adapter("second")
    lowrank.set_adapter(model, "second")
    lowrank.delete_adapter(model, "first")
    theirs.delete_adapter("first")
    assert_equal()
    with lowrank.disable_adapters(model):
        assert torch.equal(model(ids).logits, base(ids).logits)


@torch.no_grad()
def test_scale_is_never_cumulative(generator):
    model, ids = two_adapters(), words(generator)
    v = model.model.layers[0].self_attn.v_proj
    once = v.scaling["a"]
    for _ in range(3):
        lowrank.scale_adapter(model, "a", 1.5)
    assert v.scaling["a"] == 1.5 * once and v.scaling["b"] == once
    lowrank.scale_adapter(model, "a", 0.0)
    scaled = model(ids).logits
    with lowrank.disable_adapters(model):
        torch.testing.assert_close(scaled, model(ids).logits)
    lowrank.scale_adapter(model, "a", 1.0)
    assert v.scaling["a"] == once
    with pytest.raises(ConfigError, match="factor"):
        lowrank.scale_adapter(model, "a", float("nan"))


@torch.no_grad()
def test_disable_nests_and_works_as_a_call(generator):
    model, ids = two_adapters(), words(generator)
    adapted = model(ids).logits
    with lowrank.disable_adapters(model):
        base = model(ids).logits
        with lowrank.disable_adapters(model):
            pass
        assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(ids).logits, adapted) and not torch.equal(base, adapted)
    lowrank.disable_adapters(model)
    assert torch.equal(model(ids).logits, base)
    lowrank.enable_adapters(model)
    with pytest.raises(RuntimeError, match="inside"), lowrank.disable_adapters(model):
        raise RuntimeError("inside")
    assert torch.equal(model(ids).logits, adapted)
