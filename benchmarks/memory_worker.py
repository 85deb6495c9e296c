"""One training run in a process of its own: how much memory it takes at most.

`python -m benchmarks.memory_worker MODEL SETTINGS` loads the model, takes two steps as SETTINGS,
JSON, say, and prints the peak in bytes, from before anything was imported.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

import lowrank
from benchmarks.harness import status_bytes
from lowrank.train import TrainConfig, Trainer

STEPS = 2  # the optimizer's state is there from the second on


def main(source: str, settings: dict) -> None:
    """Train as told."""
    torch.manual_seed(0)
    lora, quantizer, dtype = (settings.pop(name, None) for name in ("lora", "quantizer", "dtype"))
    model = lowrank.load_model(source, quantizer, dtype=getattr(torch, dtype or "float32"))
    model.requires_grad_(True) if lora is None else lowrank.inject(
        model, lowrank.LoRAConfig(**lora)
    )
    rows = settings["per_device_train_batch_size"]
    rows *= STEPS * settings.get("gradient_accumulation_steps", 1)
    ids = torch.randint(0, model.config.vocab_size, (rows, settings["max_length"])).tolist()
    data = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as directory:
        config = TrainConfig(
            output_dir=Path(directory) / "out",
            max_steps=STEPS,
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        Trainer(model, config, data).train()
    print(status_bytes("VmHWM"))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
