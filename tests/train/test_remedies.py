"""Each ailment provoked, and the line that a run then says; a healthy run says none."""

from __future__ import annotations

import pytest
import torch

import lowrank
from lowrank.errors import TrainingError
from lowrank.train import Callback, TrainConfig, Trainer
from lowrank.train.remedies import instability, out_of_memory, overfitting, underfitting

from .support import VOCAB, Small


def chain(count: int, step: int, generator: torch.Generator) -> list[dict]:
    """Texts whose next token is a function of the last: to be learned, and not by heart alone."""
    starts = torch.randint(2, VOCAB, (count,), generator=generator)
    return [{"input_ids": [2 + (int(s) + step * i) % 13 for i in range(12)]} for s in starts]


def noise(count: int, generator: torch.Generator, words: int = VOCAB) -> list[dict]:
    """Texts of which nothing follows from anything: learned by heart, or not at all."""
    ids = torch.randint(2, words, (count, 12), generator=generator)
    return [{"input_ids": row} for row in ids.tolist()]


def run(path, rows, held_out=None, callbacks=(), **settings):
    settings = {"per_device_train_batch_size": 4, "warmup_ratio": 0.0, **settings}
    model = settings.pop("model", None) or Small()
    trainer = Trainer(model, TrainConfig(path, **settings), rows, held_out, callbacks=callbacks)
    return trainer.train()


def said(caplog) -> list[str]:
    names = ("instability", "overfitting", "underfitting")
    return [message for message in caplog.messages if message.partition(":")[0] in names]


def test_a_healthy_run_says_nothing(tmp_path, generator, caplog):
    rows = chain(40, 5, generator)
    run(tmp_path, rows, rows[:8], max_steps=60, learning_rate=1e-2, eval_steps=10)
    assert said(caplog) == []


def test_instability(tmp_path, generator, caplog):
    class Kick(Callback):
        """After 20 steps, a rate at which nothing holds."""

        def on_step_end(self, loop):
            if loop.history.steps == 20:
                for group in loop.update.optimizer.param_groups:
                    group["lr"] = 10.0
                loop.update.set_rate = lambda step: 10.0

    rows = noise(40, generator)
    run(tmp_path, rows, callbacks=[Kick()], max_steps=50, learning_rate=1e-2, max_grad_norm=0.0)
    (line,) = said(caplog)
    assert line.startswith("instability: the loss rose from ")
    assert "halve learning_rate (0.01 → 0.005), or raise warmup_ratio (0 → 0.1)" in line


@pytest.mark.parametrize("batch_noise", [0.05, 1.0])
def test_noise_alone_is_no_alarm(generator, batch_noise):
    for _ in range(20):
        losses = 2.0 + batch_noise * torch.rand(400, generator=generator)
        config = TrainConfig("nowhere")
        before = losses.mean().item()
        for n in [*range(1, 16), *range(16, 401, 7)]:
            assert instability(losses[:n].tolist(), config, before) is None


def test_overfitting(tmp_path, generator, caplog):
    rows, held_out = noise(8, generator, words=20), noise(32, generator, words=20)
    run(
        tmp_path, rows, held_out, max_steps=80, learning_rate=2e-2,
        lr_scheduler_type="constant", eval_steps=10,
    )  # fmt: skip
    (line,) = said(caplog)
    assert line.startswith("overfitting: the held-out loss rose from ")
    assert "while the training loss fell: stop at about step " in line and "lora_dropout" in line


def test_overfitting_that_only_the_end_shows(tmp_path, generator, caplog):
    rows = noise(8, generator)
    run(tmp_path, rows, noise(32, generator), max_steps=120, learning_rate=2e-2)
    (line,) = said(caplog)
    assert line.startswith("overfitting: the held-out loss rose from ") and "step 0 " in line
    assert "stop earlier (a smaller eval_steps shows where), raise lora_dropout" in line


def test_losses_that_both_rose_are_no_overfitting():
    assert overfitting([3.7, 3.7, 9.0], [(0, 3.7), (3, 6.6)], ended=True) is None
    assert "stop earlier" in overfitting([3.7, 3.0, 2.0], [(0, 3.7), (3, 6.6)], ended=True)


def test_a_rate_too_high_shows_in_the_first_steps(tmp_path, generator, caplog):
    """Though the loss falls again, when the rate does; "before" is the held-out loss."""
    rows = chain(40, 5, generator)
    settings = {"learning_rate": 10.0, "warmup_ratio": 0.05, "max_grad_norm": 0.0}
    result = run(tmp_path, rows, rows, max_steps=40, **settings)
    line = said(caplog)[0]
    assert line.startswith(f"instability: the loss rose from {result.eval_losses[0][1]:.3g} to ")
    assert int(line.partition("by step ")[2].partition(":")[0]) < 15
    assert "halve learning_rate (10 → 5)" in line


def test_a_loss_that_rose_and_came_back_wants_no_higher_rate():
    config = TrainConfig("nowhere", learning_rate=3.0)
    line = underfitting([4.6, 4.6, 26.7, 21.1, 11.7, 11.2, 5.1, 5.9, 3.8, 3.6, 5.7, 4.6], config)
    assert line.startswith("the training loss rose, 4.6000 to 15.") and "(3 → 0.3)" in line


def test_underfitting(tmp_path, generator, caplog):
    run(tmp_path, chain(40, 5, generator), max_steps=30, learning_rate=1e-7)
    (line,) = said(caplog)
    assert line.startswith("underfitting: the training loss hardly moved, ")
    assert "raise learning_rate (1e-07 → 3e-07)" in line and "all-linear" in line


def test_a_loss_that_rose_at_once_wants_a_lower_rate(tmp_path):
    config = TrainConfig(tmp_path, learning_rate=1.0)
    losses = [3.6, *torch.empty(40).uniform_(6.5, 6.7).tolist()]
    assert instability(losses, config) is None  # no mean of some steps was lower
    line = underfitting(losses, config)
    assert line.startswith("the training loss rose, 3.6000 to 6.") and "(1 → 0.1)" in line


class Greedy(Small):
    """Wants 2**58 bytes in its third forward, which no allocator gives."""

    gradient_checkpointing = False
    calls = 0

    def forward(self, input_ids):
        self.calls += 1
        if self.calls == 3:
            torch.empty(2**56)
        return super().forward(input_ids)


def test_out_of_memory(tmp_path, generator):
    with pytest.raises(TrainingError) as raised:
        run(tmp_path, chain(40, 5, generator), model=Greedy(), max_steps=9, max_length=64)
    assert str(raised.value) == (
        "out of memory in step 3: per_device_train_batch_size=2 with gradient_accumulation_steps=2,"
        " which learns the same (auto_find_batch_size=True does it), or gradient_checkpointing=True"
        ', or load_model(quantizer="nf4"), or max_length below 64'
    )
    assert "allocate" in str(raised.value.__cause__)


def test_what_is_done_already_is_no_remedy(generator):
    model = lowrank.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), "nf4")
    config = TrainConfig("nowhere", per_device_train_batch_size=1, max_length=64)
    assert out_of_memory(config, model) == "max_length below 64"


@pytest.mark.parametrize(("size", "part"), [(3, 1), (5, 1), (6, 3), (9, 3)])
def test_smaller_batches_have_as_many_examples_in_a_step(size, part):
    config = TrainConfig("nowhere", per_device_train_batch_size=size, gradient_accumulation_steps=2)
    assert out_of_memory(config, torch.nn.Linear(2, 2)).startswith(
        f"per_device_train_batch_size={part} with gradient_accumulation_steps={2 * size // part}, "
    )
