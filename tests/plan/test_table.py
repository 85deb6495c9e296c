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
