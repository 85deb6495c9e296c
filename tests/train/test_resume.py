"""A run that goes on from a checkpoint is, bit for bit, the run that never ended."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

from lowrank.train import Callback, TrainConfig, Trainer
from lowrank.train.checkpoint import checkpoints, verify_checkpoint

from .support import Small, examples, metrics_lines


class Restless(Small):
    """With dropout, random numbers of every kind in its forward, and a buffer that it changes."""

    def __init__(self):
        super().__init__(dropout=0.2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, input_ids):
        logits = super().forward(input_ids)
        if not self.training:
            return logits
        self.seen += input_ids.numel()
        noise = random.gauss(0, 1) + float(np.random.standard_normal())
        return logits * (1 + 0.01 * noise) + 1e-4 * self.seen


class Counting(Callback):
    """Has a state of its own, and changes what is learned by it."""

    def __init__(self):
        self.calls, self.mean = 0, torch.zeros(3)

    def on_step_end(self, loop):
        self.calls += 1
        self.mean = self.mean * 0.9 + torch.rand(3)
        with torch.no_grad():
            loop.model.head.bias += self.mean.sum() * self.calls * 1e-4

    def state_dict(self):
        return {"calls": self.calls, "mean": self.mean}

    def load_state_dict(self, state):
        self.calls, self.mean = state["calls"], state["mean"]


SETTINGS = {
    "max_steps": 12,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "eval_steps": 3,
    "save_steps": 5,
    "save_total_limit": None,
    "weight_decay": 0.1,
}


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Restless()


def train(folder, rows, model, callbacks=(), **changes):
    config = TrainConfig(folder, **{**SETTINGS, **changes})
    return Trainer(model, config, rows, rows[:3], callbacks=callbacks).train()


def steps_of(folder):
    """metrics.jsonl without what no two runs share."""
    changing = {"seconds", "peak_memory_bytes"}
    return [{k: v for k, v in line.items() if k not in changing} for line in metrics_lines(folder)]


def assert_same_run(one, other, model, again):
    assert one.losses == other.losses and one.eval_losses == other.eval_losses
    same = {"steps", "train_loss", "eval_loss_before", "eval_loss_after", "epochs", "tokens"}
    assert {k: one.metrics[k] for k in same} == {k: other.metrics[k] for k in same}
    assert steps_of(one.output_dir) == steps_of(other.output_dir)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_from_every_checkpoint(tmp_path, generator, seed):
    rows = examples(7, generator)  # two steps an epoch, the second of them short
    model = model_of(seed)
    whole = train(tmp_path / "whole", rows, model, [Counting()])
    names = [path.name for path in checkpoints(tmp_path / "whole")]
    assert names == ["checkpoint-12", "checkpoint-10", "checkpoint-5"]
    for name in names:
        random.seed(1), np.random.seed(1)
        again = model_of(seed + 1)  # all of it is trained, so that all of it is restored
        resume = tmp_path / "whole" / name
        other = train(tmp_path / name, rows, again, [Counting()], resume=resume)
        assert_same_run(whole, other, model, again)
        made = [path.name for path in checkpoints(tmp_path / name)]
        assert made == names[: names.index(name)] and (
            not made or verify_checkpoint(tmp_path / name / names[0]) == 12
        )
