"""Adapter files over models of several families, from PEFT and to it, and what does not fit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import FileFormatError
from tests.adapters.oracle import peft, peft_model, quiet, tiny_llama, transformers, words
from tests.io.adapters import adapted, shake
from tests.surgery.models import assert_unchanged, state


def tied_llama() -> nn.Module:
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 48, "n_embd": 24, "n_head": 2, "n_layer": 2, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(
        vocab_size=48, hidden_size=24, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=40, rope_scaling=None,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config).eval()


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=48, hidden_size=24, num_attention_heads=2, num_hidden_layers=1,
        intermediate_size=40,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).eval()


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=24, num_attention_heads=2, num_hidden_layers=1, intermediate_size=40,
        image_size=8, patch_size=4,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


CASES = {
    "GPT-2": (gpt2, {}),
    "GPT-2, whole": (gpt2, {"target_modules": "all-linear", "bias": "all", "fan_in_fan_out": True}),
    "GPT-2, embeddings": (gpt2, {"target_modules": ["wte", "c_fc"]}),
    "GPT-NeoX": (neox, {"bias": "lora_only"}),
    "BERT": (bert, {"target_modules": ["query", "word_embeddings"], "bias": "all"}),
    "BERT, rows": (bert, {"target_modules": ["value"], "trainable_token_indices": [5, 1]}),
    "ViT": (vit, {"target_modules": ["q_proj", "projection"], "modules_to_save": ["classifier"]}),
    "Llama, embeddings": (tiny_llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "Llama, DoRA": (tiny_llama, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "Llama, tied": (tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
}
each_case = pytest.mark.parametrize(("make", "options"), CASES.values(), ids=CASES)


def logits(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    with torch.no_grad():
        generator.manual_seed(3)
        if hasattr(model.config, "patch_size"):
            return model(torch.randn(2, 3, 8, 8, generator=generator)).logits
        return model(words(generator)).logits


@each_case
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_there_and_back(make, options, tmp_path, generator):
    base = make()
    theirs = peft_model(base, r=4, **copy.deepcopy(options))
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = lowrank.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    want = logits(theirs, generator)
    torch.testing.assert_close(logits(ours, generator), want, rtol=1e-5, atol=2e-5)
    assert (want - logits(base, generator)).abs().max() > 1e-2

    model = adapted(base, r=4, **options)
    lowrank.save_adapter(model, tmp_path / "ours")
    content = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert content["fan_in_fan_out"] == (make is gpt2)
    with quiet():
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    there = logits(again.eval(), generator)
    torch.testing.assert_close(logits(model, generator), there, rtol=1e-5, atol=2e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_the_base_embedding_of_a_file_comes_too(tmp_path, generator):
    """As it must where rows were added, which another start of the model has at random."""
    base = tiny_llama()
    theirs = peft_model(base, r=4, target_modules=["embed_tokens"])
    shake(theirs)
    embedding = theirs.get_input_embeddings().base_layer.weight
    embedding[40:] = torch.randn(embedding[40:].shape)
    theirs.save_pretrained(tmp_path)
    ours = lowrank.load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(
        logits(ours, generator), logits(theirs, generator), rtol=1e-5, atol=1e-5
    )


def saved(tmp_path, **options):
    lowrank.save_adapter(adapted(tiny_llama(), **options), tmp_path)
    return tmp_path


def test_each_kind_of_mismatch_is_named(tmp_path):
    directory = saved(tmp_path, target_modules=["q_proj", "up_proj"], modules_to_save=["norm"])
    config = transformers.LlamaConfig(**{**tiny_llama().config.to_dict(), "hidden_size": 32})
    model = transformers.LlamaForCausalLM(config)
    before = state(model)
    with pytest.raises(FileFormatError, match="made for another base model") as caught:
        lowrank.load_adapter(model, directory)
    said = str(caught.value)
    assert "\n" not in said
    for what in (
        "layers.*.self_attn.q_proj.lora_A.weight is [8, 24], the model takes [8, 32]",
        "layers.*.mlp.up_proj.lora_A.weight is [8, 24], the model takes [8, 32]",
        "model.norm.weight is [24], the model takes [32]",
    ):
        assert what in said
    assert "lora_B" not in said.replace("q_proj.lora_B", "")
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("there", [False, True])
def test_a_value_that_is_no_number(tmp_path, value, there):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = adapted(tiny_llama(), **options)
    for place in (model.model.layers[1].self_attn.q_proj.lora_B, model.lm_head.modules_to_save):
        weight = place["default"].weight
        with torch.no_grad():
            kept, weight[0, 0] = weight[0, 0].clone(), value
        lowrank.save_adapter(model, tmp_path)
        with torch.no_grad():
            weight[0, 0] = kept
        other = adapted(tiny_llama(), **options) if there else tiny_llama()
        before = state(other)
        with pytest.raises(FileFormatError, match="expected finite values; got NaN or inf"):
            lowrank.load_adapter(other, tmp_path)
        assert_unchanged(other, before)


def test_a_whole_module_for_another_width_or_a_missing_one(tmp_path):
    directory = saved(tmp_path / "a", target_modules=["q_proj"], modules_to_save=["norm"])
    config = json.loads((directory / "adapter_config.json").read_text())
    for change, match in (
        ({"modules_to_save": None}, "no place for model.norm.weight"),
        ({"modules_to_save": ["lm_head", "norm"]}, "the file lacks lm_head.weight"),
        ({"modules_to_save": ["score"]}, "another base model: modules_to_save: 'score' matches"),
    ):
        text = json.dumps({**config, **change})
        (directory / "adapter_config.json").write_text(text)
        model = tiny_llama()
        before = state(model)
        with pytest.raises(FileFormatError, match=match):
            lowrank.load_adapter(model, directory)
        assert_unchanged(model, before)


def test_the_same_name_twice_and_other_modules(tmp_path):
    directory = saved(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = lowrank.inject(tiny_llama(), LoRAConfig(target_modules=["q_proj"]))
    before = state(model)
    with pytest.raises(FileFormatError, match="load it under another name, or delete_adapter"):
        lowrank.load_adapter(model, directory)
    assert_unchanged(model, before)
    lowrank.load_adapter(model, directory, adapter="other")
    assert model.lm_head.modules_to_save.keys() == {"other"}
