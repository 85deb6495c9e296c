"""A run that goes on from a checkpoint is, bit for bit, the run that never ended."""

from __future__ import annotations

import copy
import logging
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank
from lowrank.train import Callback, TrainConfig, Trainer
from lowrank.train.checkpoint import checkpoints, newest_checkpoint, verify_checkpoint

from .support import Small, examples, metrics_lines
from .test_decoder_training import decoder


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
    same = ("steps", "train_loss", "eval_loss_before", "eval_loss_after", "epochs", "tokens")
    assert [one.metrics[k] for k in same] == [other.metrics[k] for k in same]
    assert steps_of(one.output_dir) == steps_of(other.output_dir)
    assert_same_weights(model, again)


def assert_same_weights(model, again):
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
        assert made == names[: names.index(name)]


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_lion_8bit", "sgd"])
def test_with_other_optimizers(tmp_path, generator, optim):
    """Over a quantized base, with dropout on the adapters; 8-bit states where they are large."""
    rows = examples(12, generator)
    base = decoder()
    lora = lowrank.LoRAConfig(r=96, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear")
    model = lowrank.inject(lowrank.quantize(base, "nf4"), lora)
    again = copy.deepcopy(model)
    settings = {"max_steps": 6, "save_steps": 3, "optim": optim, "learning_rate": 1e-3}
    whole = train(tmp_path / "whole", rows, model, **settings)
    resume = tmp_path / "whole" / "checkpoint-3"
    other = train(tmp_path / "other", rows, again, resume=resume, **settings)
    assert_same_run(whole, other, model, again)
    states = load_file(resume / "state.safetensors")
    kinds = {tensor.dtype for name, tensor in states.items() if name.startswith("optimizer//")}
    assert (torch.uint8 in kinds) == ("8bit" in optim)


def test_in_half_precision_with_a_scaler(tmp_path, generator, seed):
    rows, model, again = examples(9, generator), model_of(seed), model_of(seed)
    settings = {"fp16": True, "learning_rate": 1e-3}
    whole = train(tmp_path / "whole", rows, model, **settings)
    resume = tmp_path / "whole" / "checkpoint-5"
    other = train(tmp_path / "other", rows, again, resume=resume, **settings)
    assert_same_run(whole, other, model, again)


def test_the_best_and_the_patience(tmp_path, generator, seed):
    """The best evaluation is before the checkpoint, the end for want of a better one after it."""
    rows = examples(9, generator)
    settings = {
        "max_steps": 40, "eval_steps": 2, "save_steps": 5, "learning_rate": 0.05,
        "load_best_model_at_end": True, "early_stopping_patience": 6,
        "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    model = model_of(seed)
    whole = train(tmp_path / "whole", rows, model, **settings)
    assert whole.metrics["best_step"] < 10 and 10 < len(whole.losses) < 40
    for name in ("checkpoint-10", checkpoints(tmp_path / "whole")[0].name):
        again = model_of(seed + 1)
        resume = tmp_path / "whole" / name
        other = train(tmp_path / name, rows, again, resume=resume, **settings)
        assert whole.losses == other.losses and whole.eval_losses == other.eval_losses
        assert whole.metrics["best_step"] == other.metrics["best_step"]
        assert_same_weights(model, again)


class Signalling(Callback):
    """Ends the run with SIGTERM: in a forward of a step, or of an evaluation."""

    def __init__(self, step, training):
        self.step, self.training = step, training

    def on_train_begin(self, loop):
        self.loop = loop
        self.hook = loop.model.register_forward_pre_hook(self.forward)

    def forward(self, module, inputs):
        if self.loop.history.steps == self.step and module.training == self.training:
            self.hook.remove()
            signal.raise_signal(signal.SIGTERM)

    def on_train_end(self, loop):
        self.hook.remove()


@pytest.mark.parametrize("training", [True, False], ids=["in a step", "in an evaluation"])
def test_ended_by_a_signal(tmp_path, generator, seed, training, caplog):
    """The step is finished; an evaluation is given up, and made first when the run goes on."""
    rows, model, again = examples(9, generator), model_of(seed), model_of(seed)
    by_one = {"per_device_eval_batch_size": 1}
    whole = train(tmp_path / "whole", rows, model, **by_one)
    ended = train(tmp_path / "run", rows, again, [Signalling(6, training)], **by_one)
    steps = 7 if training else 6
    assert ended.interrupted and len(ended.losses) == steps
    assert newest_checkpoint(tmp_path / "run").name == f"checkpoint-{steps}"
    assert [step for step, _ in ended.eval_losses] == [0, 3, 6][: 3 if training else 2]
    caplog.set_level(logging.INFO, "lowrank.train")
    other = train(tmp_path / "run", rows, model_of(seed + 1), resume="auto", **by_one)
    assert f"checkpoint-{steps}: {steps} of 12 steps are done" in caplog.text
    assert whole.losses == other.losses and whole.eval_losses == other.eval_losses
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "run")


def test_a_run_that_is_made_longer(tmp_path, generator, seed):
    """By a schedule that does not know how long it is."""
    rows, model, again = examples(9, generator), model_of(seed), model_of(seed)
    settings = {"lr_scheduler_type": "constant", "eval_steps": None}
    whole = train(tmp_path / "whole", rows, model, **settings)
    train(tmp_path / "run", rows, again, max_steps=4, **settings)
    other = train(tmp_path / "run", rows, model_of(seed + 1), resume="auto", **settings)
    assert whole.losses == other.losses
    assert [step for step, _ in other.eval_losses] == [0, 4, 12]


def test_in_other_batches(tmp_path, generator):
    """Four examples a step, however they are split: the same losses but for rounding."""
    rows = examples(9, generator)
    torch.manual_seed(0)
    model = Small()
    again = copy.deepcopy(model)
    whole = train(tmp_path / "whole", rows, model)
    resume = tmp_path / "whole" / "checkpoint-5"
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    other = train(tmp_path / "other", rows, again, resume=resume, **split, logging_steps=3)
    assert whole.losses[:5] == other.losses[:5]
    torch.testing.assert_close(other.losses, whole.losses, rtol=1e-4, atol=1e-5)


def test_a_finished_run_has_nothing_left_to_do(tmp_path, generator, seed):
    rows, model, again = examples(9, generator), model_of(seed), model_of(seed + 1)
    whole = train(tmp_path / "run", rows, model, save_strategy="epoch", save_total_limit=1)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-12"]
    other = train(tmp_path / "run", rows, again, resume="auto", save_strategy="epoch")
    assert_same_run(whole, other, model, again)


def test_a_checkpoint_every_epoch(tmp_path, generator, seed):
    rows = examples(9, generator)  # three steps an epoch
    train(tmp_path / "run", rows, model_of(seed), save_strategy="epoch", max_steps=8)
    names = [path.name for path in checkpoints(tmp_path / "run")]
    assert names == [f"checkpoint-{step}" for step in (8, 6, 3)]
    train(tmp_path / "none", rows, model_of(seed), save_strategy="no", max_steps=8)
    assert checkpoints(tmp_path / "none") == []


class Stuck(Callback):
    """Holds up every fsync of a checkpoint until two steps later."""

    def __init__(self, monkeypatch):
        self.done, real = threading.Event(), os.fsync

        def fsync(handle):
            own = threading.current_thread() is threading.main_thread()
            assert own or self.done.wait(60), "the steps wait for the disk"
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)

    def on_step_end(self, loop):
        if loop.history.steps == 7:
            self.done.set()


def test_the_steps_do_not_wait_for_the_disk(tmp_path, generator, seed, monkeypatch):
    """What is saved is what was there when the saving began."""
    rows, model = examples(9, generator), model_of(seed)
    whole = train(tmp_path / "whole", rows, model)
    with monkeypatch.context() as patch:
        train(tmp_path / "stuck", rows, model_of(seed), [Stuck(patch)])
    again = model_of(seed + 1)
    assert verify_checkpoint(tmp_path / "stuck" / "checkpoint-5") == 5
    resume = tmp_path / "stuck" / "checkpoint-5"
    other = train(tmp_path / "other", rows, again, resume=resume)
    assert_same_run(whole, other, model, again)
