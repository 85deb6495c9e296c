"""What a run calls at its stations, and how one of them ends it."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from lowrank.errors import ConfigError
from lowrank.train import Callback, TrainConfig, Trainer
from lowrank.train.history import History

from .support import Small, examples


class Watching(Callback):
    """Keeps what it was called with; stops after `stop_at` steps."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at, self.histories = [], stop_at, []

    def on_train_begin(self, loop):
        self.calls.append(("begin", loop.history.steps))

    def on_evaluate(self, loop):
        self.calls.append(("evaluate", loop.history.eval_losses[-1][0]))

    def on_step_end(self, loop):
        self.calls.append(("step", loop.history.steps))
        self.histories.append(copy.deepcopy(loop.history))
        if loop.history.steps == self.stop_at:
            loop.stop()

    def on_train_end(self, loop):
        self.calls.append(("end", loop.history.steps))


def run(path, rows, *callbacks, **settings):
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "eval_steps": 2, **settings}
    trainer = Trainer(Small(), TrainConfig(path, **settings), rows, rows[:3], callbacks=callbacks)
    return trainer.train()


@pytest.mark.parametrize(
    "wrong",
    [Callback(), [Callback], [print], Callback],
    ids=["no list", "a class in it", "no callback", "a class"],
)
def test_what_is_no_list_of_callbacks_is_refused(tmp_path, generator, wrong):
    with pytest.raises(ConfigError, match="^callbacks: expected a list of objects of classes deri"):
        Trainer(Small(), TrainConfig(tmp_path), examples(4, generator), callbacks=wrong)
    with pytest.raises(ConfigError, match="^config: expected a TrainConfig; got {'output_dir'"):
        Trainer(Small(), {"output_dir": "out"}, examples(4, generator))
    with pytest.raises(ConfigError, match="^compute_metrics needs held-out data"):
        Trainer(Small(), TrainConfig(tmp_path), examples(4, generator), compute_metrics=dict)


def test_the_order_of_the_calls(tmp_path, generator):
    first, second = Watching(), Watching()
    run(tmp_path / "run", examples(9, generator), first, second)
    assert first.calls == second.calls == [
        ("begin", 0), ("evaluate", 0), ("step", 1), ("evaluate", 2), ("step", 2), ("step", 3),
        ("evaluate", 4), ("step", 4), ("end", 4),
    ]  # fmt: skip


def test_a_callback_ends_the_run(tmp_path, generator):
    watching = Watching(stop_at=3)
    result = run(tmp_path / "run", examples(9, generator), watching)
    assert len(result.losses) == 3 and watching.calls[-1] == ("end", 3)
    assert (tmp_path / "run" / "trained.safetensors").exists() and not result.interrupted


def test_an_exception_of_a_callback_ends_the_run(tmp_path, generator):
    class Fails(Callback):
        def on_step_end(self, loop):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="^mine$"):
        run(tmp_path / "run", examples(9, generator), Fails())
    assert not (tmp_path / "run" / "trained.safetensors").exists()


def test_a_history_survives_json(tmp_path, generator):
    """Every bit of it, at every step: a run that goes on from a checkpoint goes on with it."""
    rows = examples(9, generator)
    watching = Watching()
    result = run(tmp_path / "run", rows, watching, max_steps=7)
    for steps, history in enumerate(watching.histories, 1):
        assert history.steps == steps and history.losses == result.losses[:steps]
        assert History.from_dict(json.loads(json.dumps(history.to_dict()))) == history
    assert watching.histories[-1].samples == 13  # 2 + 2 + 2 + 2 + 1, then 2 + 2
    assert watching.histories[-1].tokens == result.metrics["tokens"]
    assert not torch.tensor(result.losses).isnan().any()
