"""The table of docs/memory.md is what is computed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lowrank
from lowrank.plan import plan_memory

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
SIZES = {
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "70B": (8192, 28672, 80, 64, 8),
}
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers")
NAMES += ("num_attention_heads", "num_key_value_heads")
LORA = lowrank.LoRAConfig(r=16, target_modules="all-linear")
METHODS = {"full": (None, None), "LoRA": (LORA, None), "QLoRA": (LORA, "nf4")}


@pytest.mark.slow
def test_the_table_is_what_is_computed():
    rows = re.findall(r"^\| (\w+), (\d+) tokens \| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 5
    for method, length, cells in rows:
        lora, quantizer = METHODS[method]
        written = [float(cell) for cell in cells.split(" | ")[::2]]
        for found, sizes in zip(written, SIZES.values(), strict=True):
            config = {"vocab_size": 32000, **dict(zip(NAMES, sizes, strict=True))}
            plan = plan_memory(
                {**config, "max_position_embeddings": 4096},
                lora,
                quantizer=quantizer,
                dtype=torch.bfloat16,
                per_device_train_batch_size=1,
                max_length=int(length),
                gradient_checkpointing=True,
            )
            assert round(plan.peak / 2**30, 1) == found, (method, length, sizes)


@pytest.mark.slow
def test_two_cards_of_24_gb():
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 4
    config = {"vocab_size": 32000, **dict(zip(NAMES, SIZES["70B"], strict=True))}
    parts = (
        ("packed weights", "scales"), ("dense weights", "embeddings"),
        ("adapters", "gradients", "optimizer"), ("activations", "logits"), ("workspace",),
        ("runtime",),
    )  # fmt: skip
    for rank, length, cells in rows:
        plan = plan_memory(
            {**config, "max_position_embeddings": 4096},
            lowrank.LoRAConfig(r=int(rank), target_modules="all-linear"),
            quantizer="nf4",
            dtype=torch.bfloat16,
            per_device_train_batch_size=1,
            max_length=int(length),
            gradient_checkpointing=True,
            optim="adamw_8bit",
            devices=2,
        )
        sums = [sum(plan.components[name] for name in part) for part in parts]
        expected = [round(count / 2**30, 1) for count in (*sums, plan.peak)]
        assert [float(cell) for cell in cells.split(" | ")] == expected, (rank, length)
