"""What a short training has gained on held-out text, merged into 4 bits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

import lowrank
from lowrank import LoRAConfig
from lowrank.data.stdlib import instruction_set
from lowrank.train import TrainConfig, Trainer

TINY = Path(lowrank.__file__).parent / "cli" / "tiny"


@pytest.mark.slow
def test_a_residual_keeps_the_gain_that_codes_alone_lose(tmp_path):
    tokenizer = lowrank.load_tokenizer(TINY)
    train, held_out = instruction_set()
    held_out = held_out[:: len(held_out) // 100]
    config = TrainConfig(
        output_dir=tmp_path / "out",
        overwrite_output_dir=True,
        max_steps=20,
        learning_rate=3e-4,
        per_device_train_batch_size=16,
        max_length=256,
    )

    def loss(model):
        embedding = model.model.embed_tokens.requires_grad_(True)  # a Trainer wants one to train
        trainer = Trainer(model, config, train, held_out, tokenizer=tokenizer)
        embedding.requires_grad_(False)
        return trainer.evaluate()

    model = lowrank.load_model(TINY, quantizer="nf4")
    lowrank.inject(model, LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    before = loss(model)
    Trainer(model, config, train, tokenizer=tokenizer).train()
    gain = before - loss(model)
    assert gain > 0.1

    codes = copy.deepcopy(model)
    alone = lowrank.merge_quantized(codes, residual_rank=0)
    report = lowrank.merge_quantized(model)
    assert {layer.rank for layer in report.layers} == {8}
    assert before - loss(model) >= 0.95 * gain
    assert report.kept.share > 0.85
    # alone, by rounding or refitted, the codes hold a few percent
    assert before - loss(codes) < 0.2 * gain
    assert alone.kept.share < 0.1 and report.rounded.share < 0.1
