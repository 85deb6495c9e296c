"""One adapter on an embedding and on the head that shares its weight, against PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import ConfigError
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from tests.adapters.oracle import peft, peft_model, quiet, tiny_llama, words
from tests.io.adapters import adapted, shake
from tests.surgery.models import assert_unchanged, state

TIED = {"ensure_weight_tying": True, "r": 4}
EACH = [["embed_tokens", "q_proj"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"]]


def tied_llama() -> nn.Module:
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("targets", EACH)
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_logits_and_files_are_pefts_and_the_gradient_is_whole(targets, tmp_path, generator):
    base, ids = tied_llama(), words(generator)
    theirs = peft_model(base, target_modules=list(targets), **TIED)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lowrank.load_adapter(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    for model in (ours, theirs):
        model(ids, labels=ids).loss.backward()
    table, head = theirs.get_input_embeddings(), theirs.get_output_embeddings()
    halves = {  # theirs are two parameters over one memory, each with a part of the gradient
        "lora_A": (table.lora_embedding_A["default"], head.lora_B["default"].weight),
        "lora_B": (table.lora_embedding_B["default"], head.lora_A["default"].weight),
    }
    for name, (first, second) in halves.items():
        grad = getattr(ours.model.embed_tokens, name)["default"].weight.grad
        torch.testing.assert_close(grad, first.grad + second.grad.T, rtol=1e-4, atol=1e-5)

    fresh = lowrank.inject(copy.deepcopy(base), LoRAConfig(target_modules=targets, **TIED))
    torch.testing.assert_close(fresh(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)
    assert not any("lm_head" in name for name, p in fresh.named_parameters() if p.requires_grad)
    shake(fresh)
    lowrank.save_adapter(fresh, tmp_path / "ours")
    with quiet():
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    torch.testing.assert_close(again(ids).logits, fresh(ids).logits, rtol=1e-5, atol=1e-5)
    back = lowrank.load_adapter(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(back(ids).logits, fresh(ids).logits)


@pytest.mark.parametrize("quantized", [False, True])
@torch.no_grad()
def test_switched_merged_and_copied(quantized, generator):
    base, ids = tied_llama(), words(generator)
    if quantized:
        lowrank.quantize(base, "nf4", embeddings=True)
    plain = base(ids).logits
    model = adapted(base, target_modules=EACH[0], **TIED)
    said = model(ids).logits
    assert (said - plain).abs().max() > 1e-2
    assert torch.equal(copy.deepcopy(model)(ids).logits, said)
    lowrank.inject(model, LoRAConfig(target_modules=EACH[1], **TIED), adapter="b")
    assert not any("lm_head" in n for n, p in model.named_parameters() if p.requires_grad)
    lowrank.set_adapter(model, "b")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
    torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-5)
    lowrank.set_adapter(model, "default")
    assert torch.equal(model(ids).logits, said)
    with lowrank.disable_adapters(model):
        assert torch.equal(model(ids).logits, plain)
    lowrank.merge(model)
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.base_layer.weight
    lowrank.unmerge(model)
    assert torch.equal(model(ids).logits, said)
    lowrank.delete_adapter(model, "b")
    merged = lowrank.merge_and_unload(model)
    torch.testing.assert_close(merged(ids).logits, said, rtol=1e-4, atol=1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings


STATES = {
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "the head": {"target_modules": ["lm_head"]},
    "a head of its own": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both as one": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("options", STATES.values(), ids=STATES)
@torch.no_grad()
def test_states_of_our_decoder_load_whole_and_plain(options, quantized, generator):
    base, ids = Decoder(DecoderConfig.from_hf(tied_llama().config.to_dict())), words(generator)
    if quantized:
        lowrank.quantize(base, "nf4", embeddings=True)
    model, other = (adapted(base, **options) for _ in range(2))
    assert not torch.equal(model(ids), other(ids))
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert torch.equal(model(ids), other(ids))
    plain = Decoder(base.config)
    if quantized:
        lowrank.quantize(plain, "nf4", embeddings=True)
    other.load_state_dict(plain.state_dict())
    with lowrank.disable_adapters(other):
        assert torch.equal(other(ids), plain(ids))


def test_a_method_whose_adapters_are_not_one_is_refused():
    model = tied_llama()
    before = state(model)
    with pytest.raises(ConfigError, match="method='dora'; got 'lm_head'.*exclude_modules"):
        lowrank.inject(
            model,
            LoRAConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, use_dora=True),
        )
    assert_unchanged(model, before)
