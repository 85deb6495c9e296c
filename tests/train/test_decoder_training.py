"""Training the library's own decoder: packed and padded, checkpointed, quantized, beside PEFT."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

import lowrank
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.train import TrainConfig, Trainer

from .support import VOCAB, examples, plain_loop, windows

# peft asks transformers for a property under its old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=92,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
)


def decoder() -> Decoder:
    return Decoder(
        DecoderConfig.from_hf(
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPE}
        )
    )


def config(path, **settings) -> TrainConfig:
    settings = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 3e-3, **settings}
    return TrainConfig(path, lr_scheduler_type="constant", warmup_ratio=0.0, **settings)


def test_packed_equals_padded_equals_one_by_one(tmp_path, generator):
    """Loss of each step and every gradient of the first, against examples that are run alone."""
    rows = examples(11, generator)
    gradients = {}

    def catch(model, name):
        for parameter_name, p in model.named_parameters():

            def keep(p, key=(name, parameter_name)):
                if key not in gradients:
                    gradients[key] = p.grad.clone()

            p.register_post_accumulate_grad_hook(keep)
        return model

    start = decoder()
    losses = {}
    for name, padding_free in (("packed", True), ("padded", False)):
        model = catch(copy.deepcopy(start), name)
        settings = config(tmp_path / name, padding_free=padding_free, max_grad_norm=0)
        losses[name] = Trainer(model, settings, rows).train().losses
    alone = catch(copy.deepcopy(start), "alone")
    steps = windows(rows, 42, 2, 4)[:5]
    losses["alone"], _ = plain_loop(alone, steps, [3e-3] * 5)
    torch.testing.assert_close(losses["packed"], losses["alone"], rtol=2e-5, atol=0)
    torch.testing.assert_close(losses["padded"], losses["alone"], rtol=2e-5, atol=0)
    for name, _ in start.named_parameters():
        expected = gradients["alone", name]
        for way in ("packed", "padded"):
            scale = expected.abs().max().item()
            torch.testing.assert_close(gradients[way, name], expected, rtol=1e-4, atol=1e-5 * scale)


def test_checkpointing_changes_no_bit(tmp_path, generator):
    rows = examples(9, generator)
    start = lowrank.inject(
        decoder(), lowrank.LoRAConfig(r=4, target_modules="all-linear", lora_dropout=0.2)
    )
    losses = []
    for on in (False, True, "selective"):
        settings = config(tmp_path / str(on), gradient_checkpointing=on)
        losses.append(Trainer(copy.deepcopy(start), settings, rows).train().losses)
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("quantizer", [None, "nf4"])
def test_the_saved_adapter_gives_the_held_out_loss_again(tmp_path, generator, caplog, quantizer):
    """Trained, saved, loaded into a fresh copy of the base: the same loss to the last bit."""
    caplog.set_level(logging.WARNING)
    rows, held_out = examples(16, generator), examples(5, generator)
    base = decoder()
    if quantizer is not None:
        base = lowrank.quantize(base, quantizer)
    model = lowrank.inject(
        copy.deepcopy(base), lowrank.LoRAConfig(r=4, target_modules="all-linear")
    )
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    settings = config(tmp_path / "run", max_steps=20, learning_rate=2e-2)
    result = Trainer(model, settings, rows, held_out).train()
    assert sum(result.losses[-4:]) < sum(result.losses[:4])  # the same rows, five epochs later
    assert all(
        torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before
    )
    assert not (result.output_dir / "trained.safetensors").exists()
    assert "no gradient" not in caplog.text

    fresh = lowrank.load_adapter(base, result.output_dir, is_trainable=True)
    again = Trainer(fresh, config(tmp_path / "again"), rows, held_out).evaluate()
    assert again == result.metrics["eval_loss_after"] != result.metrics["eval_loss_before"]


def test_each_trained_adapter_and_what_else_is_trained_are_saved(tmp_path, generator):
    model = decoder()
    for name in ("default", "second"):
        lowrank.inject(model, lowrank.LoRAConfig(r=2, target_modules=["q_proj"]), adapter=name)
    lowrank.set_adapter(model, "second")
    model.model.norm.requires_grad_(True)
    result = Trainer(model, config(tmp_path / "run"), examples(9, generator)).train()
    assert (result.output_dir / "second" / "adapter_model.safetensors").exists()
    assert not (result.output_dir / "adapter_model.safetensors").exists()
    other = lowrank.io.safetensors.load_safetensors(result.output_dir / "trained.safetensors")
    assert list(other) == ["model.norm.weight"]
    assert torch.equal(other["model.norm.weight"], model.model.norm.weight)


def test_trains_as_transformers_and_peft_do(tmp_path, generator):
    """The same base and the same A: the same losses, ours packed, theirs one by one."""
    transformers = pytest.importorskip(
        "transformers", reason="the oracle; pip install transformers"
    )
    peft = pytest.importorskip("peft", reason="the oracle; pip install peft")
    rows = examples(13, generator)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    ours = decoder()
    ours.load_state_dict(theirs.state_dict())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets)
    )
    lowrank.inject(ours, lowrank.LoRAConfig(r=4, lora_alpha=16, target_modules=targets))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                ours.get_parameter(name.removeprefix("base_model.model.")).copy_(p)
    settings = config(
        tmp_path / "run", max_steps=12, gradient_accumulation_steps=2, max_grad_norm=0.3
    )
    result = Trainer(ours, settings, rows).train()
    steps = windows(rows, 42, 6, 8)[:12]
    losses, _ = plain_loop(theirs, steps, [3e-3] * 12, max_norm=0.3)
    torch.testing.assert_close(result.losses, losses, rtol=1e-4, atol=0)
    assert sum(losses[-2:]) < sum(losses[:2])  # the same rows, five epochs later


def test_a_peft_model_trains_and_is_saved_by_name(tmp_path, generator):
    """A module with an adapter of another library: what is trained is kept under its own names."""
    transformers = pytest.importorskip(
        "transformers", reason="the oracle; pip install transformers"
    )
    peft = pytest.importorskip("peft", reason="the oracle; pip install peft")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    rows = examples(8, generator)
    reference = copy.deepcopy(model)
    settings = config(tmp_path / "run", gradient_checkpointing=True, max_steps=4)
    result = Trainer(model, settings, rows).train()
    losses, _ = plain_loop(reference, windows(rows, 42, 2, 4), [3e-3] * 4, max_norm=1.0)
    torch.testing.assert_close(result.losses, losses, rtol=2e-5, atol=0)
    saved = lowrank.io.safetensors.load_safetensors(result.output_dir / "trained.safetensors")
    assert saved.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
