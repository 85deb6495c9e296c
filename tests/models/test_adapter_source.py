"""An adapter as the source of a model: its base from its config, and the adapter on it."""

from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close

import lowrank
from lowrank.errors import ConfigError, FileFormatError
from tests.adapters.oracle import peft, quiet
from tests.models.helpers import llama, tokens
from tests.models.test_tokenizer import write_tokenizer


@pytest.fixture
def adapter(tmp_path):
    """(an adapter's directory as PEFT writes it, its base's directory, PEFT's model)"""
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    with quiet():
        model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", tmp_path / "base", model


def edit(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@torch.no_grad()
def test_the_base_is_loaded_and_the_adapter_put_onto_it(adapter):
    directory, base, theirs = adapter
    ids = tokens(2, 20)
    model = lowrank.load_model(directory)
    assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert model.name_or_path == str(base) and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    quantized = lowrank.load_adapter(lowrank.load_model(base, "nf4"), directory)
    assert torch.equal(lowrank.load_model(str(directory), "nf4")(ids), quantized(ids))
    assert set(lowrank.open_weights(directory)) == set(lowrank.open_weights(base))


def test_an_adapter_that_changed_its_base_finds_it_changed(adapter, tmp_path):
    _, base, _ = adapter
    model = lowrank.load_model(base, "nf4")
    config = lowrank.LoRAConfig(r=4, init_lora_weights="loftq")
    lowrank.inject(model, config, weights=lowrank.open_weights(base))
    lowrank.save_adapter(model, tmp_path / "loftq")
    ids = tokens(1, 20)
    assert torch.equal(lowrank.load_model(tmp_path / "loftq", "nf4")(ids), model(ids))


def test_a_directory_with_a_model_is_that_model(adapter):
    directory, base, _ = adapter
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_bytes((base / name).read_bytes())
    edit(directory, base_model_name_or_path="nowhere/at-all")
    ids = tokens(1, 9)
    assert torch.equal(lowrank.load_model(directory)(ids), lowrank.load_model(base)(ids))


def test_a_tokenizer_is_the_adapters_own_or_else_the_bases(adapter):
    directory, base, _ = adapter
    with pytest.raises(FileFormatError, match="expected tokenizer.json"):
        lowrank.load_tokenizer(directory)
    write_tokenizer(base, chat_template="{{ 'base' }}")
    assert lowrank.load_tokenizer(directory).chat_template == "{{ 'base' }}"
    write_tokenizer(directory, chat_template="{{ 'own' }}")
    assert lowrank.load_tokenizer(directory).chat_template == "{{ 'own' }}"


def test_a_base_that_cannot_be_found_is_said_with_what_to_do(adapter):
    directory, _, _ = adapter
    for load in (lowrank.load_model, lowrank.open_weights, lowrank.load_tokenizer):
        edit(directory, base_model_name_or_path="/home/elsewhere/llama")
        with pytest.raises(ConfigError, match="/home/elsewhere/llama: no such directory"):
            load(directory)
        edit(directory, base_model_name_or_path=None)
        with pytest.raises(ConfigError, match="names no base_model_name_or_path"):
            load(directory)
    edit(directory, base_model_name_or_path=3)
    with pytest.raises(FileFormatError, match="base_model_name_or_path"):
        lowrank.load_model(directory)
