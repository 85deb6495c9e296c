"""Adapter directories: PEFT's we read, and ours PEFT reads."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import FileFormatError
from tests.adapters.oracle import peft, peft_model, quiet, tiny_llama, words
from tests.io.adapters import adapted, shake

CASES = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all linears": {"target_modules": "all-linear", "r": 3},
    "regex": {"target_modules": r".*layers\.1\..*_proj"},
    "rank-stabilized": {"target_modules": ["up_proj"], "use_rslora": True, "lora_alpha": 5},
    "magnitudes": {"target_modules": "all-linear", "use_dora": True, "lora_alpha": 5},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\..*": 6},
        "alpha_pattern": {"q_proj": 3},
    },
    "one block": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "target biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "for a task": {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"},
}


@torch.no_grad()
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_peft_reads_what_we_write(tmp_path, generator, options):
    base, ids = tiny_llama(attention_bias=True), words(generator)
    model = adapted(base, **options)
    assert lowrank.save_adapter(model, tmp_path / "out") == tmp_path / "out"
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out"))
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert (theirs(ids).logits - base(ids).logits).abs().max() > 1e-2
    again = lowrank.load_adapter(copy.deepcopy(base), tmp_path / "out")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not any(p.requires_grad for p in again.parameters())


@torch.no_grad()
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_we_read_what_peft_writes_and_write_the_same(tmp_path, generator, options):
    base, ids = tiny_llama(attention_bias=True), words(generator)
    theirs = peft_model(base, **options)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = lowrank.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)

    lowrank.save_adapter(model, tmp_path / "ours")
    files = [tmp_path / who / "adapter_model.safetensors" for who in ("theirs", "ours")]
    assert files[0].read_bytes() == files[1].read_bytes()
    texts = [(tmp_path / who / "adapter_config.json").read_text() for who in ("theirs", "ours")]
    configs = [json.loads(text) for text in texts]
    for config in configs:
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()  # a set of PEFT's has no order
    assert configs[0] == configs[1]
    if peft.__version__ == configs[1]["peft_version"]:
        assert len(texts[0]) == len(texts[1]) and sorted(texts[0]) == sorted(texts[1])


@torch.no_grad()
def test_another_adapter_lies_in_its_own_directory(tmp_path, generator):
    base, ids = tiny_llama(), words(generator)
    model = adapted(base, adapter="first", target_modules=["q_proj"])
    lowrank.inject(
        model, LoRAConfig(target_modules=["up_proj"], init_lora_weights=False), adapter="second"
    )
    assert lowrank.save_adapter(model, tmp_path, adapter="second") == tmp_path / "second"
    assert os.listdir(tmp_path) == ["second"]
    lowrank.set_adapter(model, "second")
    with quiet():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "second"))
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)

    # into a model that has one: it is there, idle, and asked for it speaks
    other = adapted(base, target_modules=["q_proj"])
    before = other(ids).logits
    lowrank.load_adapter(other, tmp_path / "second", adapter="guest", is_trainable=True)
    assert torch.equal(other(ids).logits, before)
    lowrank.set_adapter(other, "guest")
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert {n.split(".")[-2] for n, p in other.named_parameters() if p.requires_grad} == {"guest"}


@torch.no_grad()
def test_loads_into_the_adapter_that_is_there(tmp_path, generator):
    base, ids = tiny_llama(), words(generator)
    saved = adapted(base, r=4, target_modules=["q_proj"])
    lowrank.save_adapter(saved, tmp_path)
    model = adapted(base, r=4, target_modules=["q_proj"])
    assert not torch.equal(model(ids).logits, saved(ids).logits)
    lowrank.load_adapter(model, tmp_path)
    assert torch.equal(model(ids).logits, saved(ids).logits)
    assert any(p.requires_grad for p in model.parameters())
    for options in ({"r": 4, "lora_alpha": 9}, {"r": 2}, {"r": 4, "use_rslora": True}):
        other = adapted(base, target_modules=["q_proj"], **options)
        before = other(ids).logits
        with pytest.raises(FileFormatError, match="delete_adapter"):
            lowrank.load_adapter(other, tmp_path)
        assert torch.equal(other(ids).logits, before)


@torch.no_grad()
def test_over_a_quantized_base(tmp_path, generator):
    base, ids = lowrank.quantize(tiny_llama(), "nf4"), words(generator)
    model = adapted(base, target_modules="all-linear")
    lowrank.save_adapter(model, tmp_path)
    again = lowrank.load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_layers_built_by_hand_are_saved_too(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = lowrank.LoRALinear(8, 6, config=LoRAConfig(r=2, init_lora_weights=False))
            self.two = lowrank.LoRALinear(
                6, 4, config=LoRAConfig(r=3, lora_alpha=1, init_lora_weights=False)
            )

    model = Model()
    lowrank.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["one", "two"]
    plain = nn.ModuleDict({"one": nn.Linear(8, 6), "two": nn.Linear(6, 4)})
    lowrank.load_adapter(plain, tmp_path)
    assert plain["two"].scaling == model.two.scaling
    assert torch.equal(plain["two"].lora_B["default"].weight, model.two.lora_B["default"].weight)


def test_the_model_card_names_the_base(tmp_path):
    base = tiny_llama()
    base.name_or_path = "someone/llama: large"
    lowrank.save_adapter(adapted(base, target_modules=["q_proj"]), tmp_path)
    card = (tmp_path / "README.md").read_text()
    yaml = pytest.importorskip("yaml", reason="needs yaml, which peft brings")
    head = yaml.safe_load(card.split("---")[1])
    assert head == {
        "library_name": "peft",
        "base_model": "someone/llama: large",
        "tags": ["lora", "lowrank"],
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/llama: large"
