"""Adapters that belong to a base which their own start changed: saved, and loaded over it alone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig, LoRALinear, quant
from lowrank.errors import ConfigError, FileFormatError, LowrankError
from lowrank.io.safetensors import SafetensorsFile, load_safetensors, write_safetensors
from tests.adapters.oracle import peft, peft_model, quiet, tiny_llama, words
from tests.io.adapters import shake
from tests.surgery.models import assert_unchanged, refused, state

STARTS = ["loftq", "pissa", "pissa_niter_3"]
FILE = "adapter_model.safetensors"


def config(init: bool | str, **options) -> LoRAConfig:
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}
    if isinstance(init, str):
        options["loftq_config"] = {"loftq_iter": 3}
    return LoRAConfig(init_lora_weights=init, **options)


@pytest.fixture
def dense() -> nn.Module:
    return tiny_llama(attention_bias=True)


def quantized(dense: nn.Module, quantizer="nf4") -> nn.Module:
    return lowrank.quantize(copy.deepcopy(dense), quantizer)


def trained(dense: nn.Module, init: bool | str, **options) -> nn.Module:
    model = lowrank.inject(copy.deepcopy(dense), config(init, **options), quantizer="nf4")
    shake(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("init", STARTS)
def test_the_base_is_made_again_bit_for_bit(init, dense, tmp_path, generator):
    model, ids = trained(dense, init), words(generator)
    want, weights = model(ids).logits, dense.state_dict()
    lowrank.save_adapter(model, tmp_path)
    over = lowrank.inject(copy.deepcopy(dense), config(init), quantizer="nf4")
    for again in (
        lowrank.load_adapter(quantized(dense), tmp_path, weights=weights),
        lowrank.load_adapter(copy.deepcopy(dense), tmp_path, quantizer="nf4"),
        lowrank.load_adapter(over, tmp_path),
    ):
        assert torch.equal(again(ids).logits, want)
        # what is saved from there is the same, and says the same
        lowrank.save_adapter(again, tmp_path / "again")
        assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / FILE).read_bytes()
        name = "adapter_config.json"
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text()


@torch.no_grad()
def test_the_base_saved_as_it_is_needs_nothing_else(dense, tmp_path, generator):
    model, ids = trained(dense, "pissa"), words(generator)
    lowrank.save_adapter(model, tmp_path / "adapter")
    lowrank.save_quantized(model, tmp_path / "whole")
    # the whole state, adapter included, into a model of the same modules
    again = lowrank.inject(copy.deepcopy(dense), config(True), quantizer="int4")
    lowrank.load_quantized(again, tmp_path / "whole")
    assert torch.equal(again(ids).logits, model(ids).logits)
    # the base alone is known by its bits, and the adapter comes over it from its own file
    base = copy.deepcopy(model)
    for name, layer in list(base.named_modules()):
        if isinstance(layer, LoRALinear):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, layer.base_layer)
    lowrank.save_quantized(base, tmp_path / "base")
    again = lowrank.load_quantized(copy.deepcopy(dense), tmp_path / "base")
    lowrank.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("init", STARTS)
def test_another_base_is_refused_and_nothing_changes(init, dense, tmp_path):
    lowrank.save_adapter(trained(dense, init), tmp_path)
    weights = dense.state_dict()
    other = {name: w + 0.02 * torch.randn_like(w) for name, w in weights.items()}
    fresh = lowrank.inject(quantized(dense), config(True))
    fewer = config(init)
    fewer.loftq_config = {"loftq_iter": 1}
    fewer = lowrank.inject(quantized(dense), fewer, weights=weights)
    shown = "trained over what this left of the weights; the base of .*weights=lowrank.open_weights"
    remade = "makes another base than it was trained over; .* same quantizer and options"
    for model, arguments, match in (
        (dense, {}, shown if init == "loftq" else remade),
        (quantized(dense), {}, shown),
        (fresh, {}, shown),
        (fewer, {}, shown),
        (dense, {"quantizer": "int4"}, remade),
        (dense, {"quantizer": quant.get("nf4", block_size=32)}, remade),
        (quantized(dense, "fp4"), {"weights": weights}, remade),
        (quantized(dense), {"weights": other}, remade),
    ):
        with refused(model, FileFormatError, match):
            lowrank.load_adapter(model, tmp_path, **arguments)
    for model, arguments in ((dense, {"weights": weights}), (quantized(dense), {"weights": {}})):
        before = state(model)
        with pytest.raises(LowrankError):
            lowrank.load_adapter(model, tmp_path, **arguments)
        assert_unchanged(model, before)


@torch.no_grad()
def test_one_iteration_of_loftq_leaves_the_quantized_weights(dense, tmp_path, generator):
    """So its adapter fits the model that anyone quantizes, and needs no original."""
    options = LoRAConfig(r=4, target_modules="all-linear", init_lora_weights="loftq")
    model, ids = lowrank.inject(copy.deepcopy(dense), options, quantizer="nf4"), words(generator)
    lowrank.save_adapter(model, tmp_path)
    again = lowrank.load_adapter(quantized(dense), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_an_adapter_of_the_unchanged_base_does_not_go_over_a_changed_one(dense, tmp_path):
    plain = trained(dense, True)
    lowrank.save_adapter(plain, tmp_path)
    model = lowrank.inject(copy.deepcopy(dense), config("pissa"), quantizer="nf4")
    before = state(model)
    with pytest.raises(FileFormatError, match="made for the base as it was; .*has changed it"):
        lowrank.load_adapter(model, tmp_path)
    with pytest.raises(ConfigError, match="has the principal part"):
        lowrank.load_adapter(model, tmp_path, adapter="b")
    assert_unchanged(model, before)


@torch.no_grad()
def test_pefts_pissa_both_ways(dense, tmp_path, generator):
    """PEFT starts it anew from the dense weights when it loads it, and so do we."""
    ids = words(generator)
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"}
    options["target_modules"] = ["q_proj", "up_proj"]
    theirs = peft_model(dense, **options)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    plain = lowrank.load_adapter(copy.deepcopy(dense), tmp_path / "theirs")
    torch.testing.assert_close(plain(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    ours = lowrank.load_adapter(copy.deepcopy(dense), tmp_path / "theirs", quantizer="none")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    same = lowrank.inject(copy.deepcopy(dense), LoRAConfig(**options), quantizer="none")
    lowrank.load_adapter(same, tmp_path / "theirs")
    assert torch.equal(same(ids).logits, ours(ids).logits)

    shake(lowrank.set_adapter(ours, "default") or ours)
    lowrank.save_adapter(ours, tmp_path / "ours")
    with quiet():
        again = peft.PeftModel.from_pretrained(copy.deepcopy(dense), str(tmp_path / "ours"))
    torch.testing.assert_close(again(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)


def test_pefts_fast_pissa_is_another_each_time(dense, tmp_path):
    options = {"r": 4, "init_lora_weights": "pissa_niter_2", "target_modules": ["q_proj"]}
    peft_model(dense, **options).save_pretrained(tmp_path)
    with quiet():
        again = [peft.PeftModel.from_pretrained(copy.deepcopy(dense), str(tmp_path)) for _ in "ab"]
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert not torch.equal(again[0].state_dict()[name], again[1].state_dict()[name])
    with pytest.raises(FileFormatError, match="PEFT's fast SVD is another one each time"):
        lowrank.load_adapter(copy.deepcopy(dense), tmp_path, quantizer="none")


def test_the_numbers_are_where_peft_passes_over_them(dense, tmp_path):
    lowrank.save_adapter(trained(dense, "pissa"), tmp_path)
    numbers = json.loads(SafetensorsFile(tmp_path / FILE).metadata["lowrank.base"])
    assert len(numbers) == 14 and all(isinstance(n, float) for n in numbers.values())
    lowrank.save_adapter(trained(dense, True), tmp_path / "plain")
    assert SafetensorsFile(tmp_path / "plain" / FILE).metadata == {"format": "pt"}
    tensors = load_safetensors(tmp_path / FILE)
    for damage in ("{", "[1]", '{"a": "b"}'):
        write_safetensors(tmp_path / FILE, tensors, {"lowrank.base": damage})
        with pytest.raises(FileFormatError, match="damaged metadata lowrank.base"):
            lowrank.load_adapter(quantized(dense), tmp_path, weights=dense.state_dict())
