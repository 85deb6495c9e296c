"""A run that may be killed and started again: python -m tests.train.killed_run FOLDER STEPS."""

from __future__ import annotations

import random
import sys

import numpy as np
import torch

from lowrank.train import TrainConfig, Trainer

from .support import Small, examples


class Noisy(Small):
    """Takes random numbers of all three kinds."""

    def forward(self, input_ids):
        noise = random.random() + float(np.random.random()) if self.training else 0.0
        return super().forward(input_ids) * (1 + 0.01 * noise)


def run(folder: str, steps: int) -> None:
    """Prints a line when all is ready for the first step or the next one."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    rows = examples(23, torch.Generator().manual_seed(1))
    config = TrainConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        eval_steps=7,
        save_steps=5,
        resume="auto",
    )
    trainer = Trainer(Noisy(dropout=0.1), config, rows, rows[:3])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    trainer.train()


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))
