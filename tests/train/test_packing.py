"""Packs are trained on as their examples are alone: the loss and every gradient."""

from __future__ import annotations

import copy
import logging
import random

import pytest
import torch
from torch import nn

import lowrank
from lowrank.data import Sampler, collate, load_examples, tokenize_all
from lowrank.data.packing import best_fit_decreasing
from lowrank.errors import ConfigError
from lowrank.io.safetensors import load_safetensors
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.train import TrainConfig, Trainer

from .support import VOCAB, Small, example_loss, examples, metrics_lines

transformers = pytest.importorskip("transformers", reason="the oracle; pip install transformers")

SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=60,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
PACK = 24


def llama(attention: str = "sdpa") -> nn.Module:
    settings = transformers.LlamaConfig(**SHAPE, attn_implementation=attention)
    return transformers.LlamaForCausalLM(settings)


def gpt2() -> nn.Module:
    """Its positions are learned: those of a pack must restart, not only be relative."""
    settings = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    dropout = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, **settings, **dropout)
    )


def decoder(like: nn.Module) -> Decoder:
    """The library's own with the weights of a transformers Llama."""
    hf = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPE}
    model = Decoder(DecoderConfig.from_hf(hf))
    model.load_state_dict(like.state_dict())
    return model


def config(path, **settings) -> TrainConfig:
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "warmup_ratio": 0, **settings}
    return TrainConfig(path, packing=True, max_length=PACK, max_grad_norm=0, **settings)


def check(path, model: nn.Module, alone: nn.Module, rows: list[dict], **settings) -> None:
    """A step of two batches of two packs by `model`; their examples one by one by `alone`."""
    gradients = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(
                lambda p, name=name: gradients.__setitem__(name, p.grad.clone())
            )
    settings = config(path, gradient_accumulation_steps=2, **settings)
    result = Trainer(model, settings, rows).train()

    lengths = [len(row["input_ids"]) for row in rows]
    step = Sampler(lengths, 2, 2, settings.seed, pack_to=PACK).step(0)
    packs = [pack for batch in step for pack in batch]
    assert len(packs) == 4 and max(map(len, packs)) > 1
    assert all(sum(lengths[i] for i in pack) <= PACK for pack in packs)
    parts = [example_loss(alone, rows[i]) for pack in packs for i in pack]
    loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
    loss.backward()
    assert result.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: p.grad for name, p in alone.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys()
    for name, grad in expected.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(gradients[name], grad, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_decoder_on_packs_is_llama_on_each_example(tmp_path, generator, checkpointing):
    theirs = llama()
    rows = examples(30, generator)
    check(tmp_path, decoder(theirs), theirs, rows, gradient_checkpointing=checkpointing)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_of_transformers_is_given_a_mask(tmp_path, generator, attention):
    model = llama(attention)
    check(tmp_path, model, copy.deepcopy(model), examples(30, generator))


def test_learned_positions_restart(tmp_path, generator):
    model = gpt2()
    check(tmp_path, model, copy.deepcopy(model), examples(30, generator))


def test_adapters_over_quantized_weights(tmp_path, generator):
    """QLoRA: B is not 0, so that A learns too."""
    settings = lowrank.LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = lowrank.inject(lowrank.quantize(decoder(llama()), "nf4"), settings)
    check(tmp_path, model, copy.deepcopy(model), examples(30, generator))


def test_every_epoch_packs_anew_and_counts_examples(tmp_path, generator, caplog):
    caplog.set_level(logging.INFO)
    rows, held_out = examples(50, generator), examples(5, generator)
    sampler = Sampler([len(r["input_ids"]) for r in rows], 3, 1, 42, pack_to=PACK)
    settings = config(
        tmp_path / "run", max_steps=-1, num_train_epochs=2, per_device_train_batch_size=3
    )
    result = Trainer(decoder(llama()), settings, rows, held_out).train()
    full = 100 * sum(sampler.lengths) / (sampler.rows_per_epoch * PACK)
    said = f"50 examples in {sampler.rows_per_epoch} rows of 24 tokens, {full:.1f} % full"
    assert f"packing: {said}" in caplog.text
    assert len(result.losses) == 2 * sampler.steps_per_epoch
    assert result.metrics["epochs"] == 2.0
    lines = [line for line in metrics_lines(tmp_path / "run") if "loss" in line]
    assert sum(line["tokens"] for line in lines) == 2 * sum(sampler.lengths)
    assert max(line["tokens"] for line in lines) <= 3 * PACK
    again = decoder(llama())
    again.load_state_dict(load_safetensors(result.output_dir / "trained.safetensors"))
    unpacked = Trainer(again, TrainConfig(tmp_path / "unpacked"), rows, held_out)
    assert unpacked.evaluate() == pytest.approx(result.metrics["eval_loss_after"], rel=1e-5)


class Mixes(nn.Module):
    """Takes positions and a mask, and heeds neither."""

    def __init__(self):
        super().__init__()
        self.inner = Small()

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.inner(input_ids)


def test_a_model_that_mixes_examples_is_refused(tmp_path, generator):
    rows = examples(9, generator)
    with pytest.raises(ConfigError, match="Mixes does not keep the examples of a pack apart"):
        Trainer(Mixes(), config(tmp_path / "run"), rows)
    with pytest.raises(ConfigError, match="Small fails on a pack, .* unexpected keyword"):
        Trainer(Small(), config(tmp_path / "run"), rows)
    assert list(tmp_path.iterdir()) == []


def test_packing_and_grouping_exclude_one_another(tmp_path):
    with pytest.raises(ConfigError, match="packing and group_by_length are both on"):
        config(tmp_path, group_by_length=True)


@pytest.mark.slow
def test_smollm2_on_packs_is_smollm2_on_each_example(smollm2, data_dir):
    """Real weights and pairs, in float64: 30 layers round 1e-5 away in float32, packed or not."""
    tokenizer = lowrank.load_tokenizer(smollm2)
    model = lowrank.load_model(smollm2, dtype=torch.float64)
    settings = lowrank.LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    lowrank.inject(model, settings)
    pairs = load_examples(
        data_dir / "e2e_train.jsonl.gz",
        formatting_func=lambda row: {"prompt": row["mr"], "completion": row["ref"]},
    )
    some = load_examples(random.sample(pairs.rows, 4))
    data = tokenize_all(some, tokenizer, max_length=40, completion_only_loss=False)
    packs = best_fit_decreasing(data.lengths, range(4), 90)
    assert len(packs) < 4
    found = []
    for batches in ([packs], [[[i]] for i in range(4)]):
        model.zero_grad()
        total = 0.0
        for rows in batches:
            batch = collate(data, rows, end_to_end=True)
            loss = model.loss(batch.input_ids, batch.labels, position_ids=batch.position_ids)
            loss.backward()
            total += loss.item()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        found.append((total, gradients))
    (packed, gradients), (alone, expected) = found
    assert packed == pytest.approx(alone, rel=2e-7)  # float32 scalars
    for name, grad in expected.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(gradients[name], grad, rtol=0, atol=1e-12 * scale)
