"""What a run does not go on with, and what then stays as it was; faults while it saves."""

from __future__ import annotations

import copy
import errno
import os

import pytest
import torch
from torch import nn

import lowrank
from lowrank.errors import ConfigError, FileFormatError, TrainingError
from lowrank.train import Callback, TrainConfig, Trainer
from lowrank.train.checkpoint import checkpoints, newest_checkpoint, verify_checkpoint

from .faults import Files
from .support import Small, examples, metrics_lines

LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["head"]}
SETTINGS = {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 2}


def adapted(base, **changes) -> nn.Module:
    return lowrank.inject(copy.deepcopy(base), lowrank.LoRAConfig(**{**LORA, **changes}))


def train(folder, rows, model, eval_data=None, callbacks=(), **changes):
    config = TrainConfig(folder, **{**SETTINGS, **changes})
    return Trainer(model, config, rows, eval_data, callbacks=callbacks).train()


def content(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def rows(generator):
    return examples(9, generator)


@pytest.fixture
def base():
    return Small()


@pytest.fixture
def out(tmp_path, rows, base):
    """The directory of a run that has checkpoints of steps 4 and 6."""
    train(tmp_path / "run", rows, adapted(base))
    return tmp_path / "run"


CHANGED = {
    "rank": ({"lora": {"r": 4}}, "r of adapter 'default' was 3 and is 4"),
    "alpha": ({"lora": {"lora_alpha": 7}}, "lora_alpha of adapter 'default' was 6 and is 7"),
    "targets": (
        {"lora": {"target_modules": ["embed"]}},
        "target_modules .* was .*head.* is .*embed",
    ),
    "method": ({"lora": {"use_dora": True}}, "use_dora of adapter 'default' was false and is true"),
    "dropout": ({"lora": {"lora_dropout": 0.5}}, "lora_dropout .* was 0.0 and is 0.5"),
    "rate": ({"learning_rate": 1.0}, "learning_rate was 0.0002 and is 1.0"),
    "schedule": ({"lr_scheduler_type": "linear"}, 'lr_scheduler_type was "cosine" and is "linear"'),
    "optimizer": ({"optim": "sgd"}, 'optim was "adamw_torch" and is "sgd"'),
    "seed": ({"seed": 7}, "seed was 42 and is 7"),
    "batch": ({"per_device_train_batch_size": 3}, "examples in a step was 2 and is 3"),
    "fewer steps": ({"max_steps": 3}, "it has taken 6 steps, and this run is to take 3"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_another_run_is_refused_and_nothing_changes(out, rows, base, change):
    settings, reason = copy.deepcopy(CHANGED[change])
    before, model = content(out), adapted(base, **settings.pop("lora", {}))
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=reason) as caught:
        train(out, rows, model, resume="auto", **{"max_steps": 9, **settings})
    assert "\n" not in str(caught.value) and "checkpoint-6 cannot be resumed" in str(caught.value)
    assert content(out) == before
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in weights.items())


def test_other_weights_dtypes_and_data_are_refused(out, rows, base):
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.mix.weight_hh_l0[3, 5] += 1e-4
    frozen = "the frozen weights are others: another base model, or quantized otherwise"
    half = adapted(base).bfloat16()
    for model, data, held_out, reason in (
        (adapted(other), rows, None, frozen),
        (adapted(lowrank.quantize(copy.deepcopy(base), "nf4")), rows, None, frozen),
        (
            half,
            rows,
            None,
            r"lora_A.default.weight of trained tensors was .*float32.* is .*bfloat16",
        ),
        (copy.deepcopy(base), rows, None, "adapter 'default' is only in the checkpoint"),
        (adapted(base), rows[::-1], None, "the training data is not what it was"),
        (adapted(base), rows, rows[:2], "held out data came or went"),
    ):
        with pytest.raises(ConfigError, match=reason):
            train(out, data, model, held_out, resume="auto")


def test_which_checkpoint(out, rows, base, tmp_path, caplog):
    """The newest that verifies; or the one that was named, unless later ones would be lost."""
    older, newest = out / "checkpoint-4", out / "checkpoint-6"
    with pytest.raises(ConfigError, match="checkpoint-4 is not the newest: checkpoint-6 would be"):
        train(out, rows, adapted(base), resume=older)
    wanted = "expected 'auto' or a checkpoint's directory; got .*, which"
    with pytest.raises(ConfigError, match=f"{wanted} is no directory"):
        train(out, rows, adapted(base), resume=out / "checkpoint-5")
    with pytest.raises(ConfigError, match=f"{wanted} has no MANIFEST.json"):
        train(tmp_path / "none", rows, adapted(base), resume=tmp_path)
    with pytest.raises(ConfigError, match=r"already holds a run .* set resume=\"auto\" to go on"):
        train(out, rows, adapted(base))
    elsewhere = train(tmp_path / "new", rows, adapted(base), resume=out)  # the newest in there
    assert len(elsewhere.losses) == 6 and checkpoints(tmp_path / "new") == []

    (newest / "state.safetensors").write_bytes(b"")
    again = train(out, rows, adapted(base), resume="auto")
    assert "checkpoint-6 is passed over" in caplog.text and "bytes; got 0" in caplog.text
    assert again.losses == elsewhere.losses and verify_checkpoint(newest) == 6
    assert [line["step"] for line in metrics_lines(out)] == [1, 2, 3, 4, 5, 6]

    train(out, rows, adapted(base), resume=older, overwrite_output_dir=True, max_steps=5)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-5", "checkpoint-4"]


def test_when_none_verifies(out, rows, base):
    for path in checkpoints(out):
        (path / "MANIFEST.json").unlink()
    before = content(out)
    with pytest.raises(FileFormatError, match="no checkpoint verifies; .* start anew"):
        train(out, rows, adapted(base), resume="auto")
    assert content(out) == before
    anew = train(out, rows, adapted(base), resume="auto", overwrite_output_dir=True)
    assert len(anew.losses) == 6 and newest_checkpoint(out).name == "checkpoint-6"


def test_a_run_that_died_before_its_first_checkpoint_begins_again(tmp_path, rows, base):
    class Dies(Callback):
        def on_step_end(self, loop):
            raise RuntimeError("the end")

    with pytest.raises(RuntimeError, match="the end"):
        train(tmp_path, rows, adapted(base), callbacks=[Dies()])
    assert [line["step"] for line in metrics_lines(tmp_path)] == [1]
    train(tmp_path, rows, adapted(base), resume="auto")
    assert [line["step"] for line in metrics_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_two_runs_on_one_directory(tmp_path, rows, base):
    class Second(Callback):
        def on_step_end(self, loop):
            for resume in ("auto", None):
                with pytest.raises(
                    ConfigError, match=f"in use by another run .process {os.getpid()}"
                ):
                    train(tmp_path, rows, adapted(base), resume=resume, overwrite_output_dir=True)

    train(tmp_path, rows, adapted(base), callbacks=[Second()])
    assert [line["step"] for line in metrics_lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path, rows, base, code):
    """Those before it stay; when there is room again, the run goes on from there."""
    model = adapted(base)
    whole = train(tmp_path / "whole", rows, copy.deepcopy(model))

    def full(number, call, path):
        if ".checkpoint-4" in path:
            raise OSError(code, os.strerror(code))

    out = tmp_path / "run"
    with Files(out, full), pytest.raises(OSError, match="checkpoint-4") as caught:
        train(out, rows, model)
    assert caught.value.errno == code
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    assert not (out / ".lock").exists()
    again = train(out, rows, adapted(base), resume="auto")
    assert again.losses == whole.losses


def test_weights_that_are_not_finite_are_not_saved(tmp_path, rows, base):
    class Spoils(Callback):
        def on_step_end(self, loop):
            if loop.history.steps == 4:
                with torch.no_grad():
                    loop.model.head.lora_B["default"].weight[0, 0] = torch.inf

    with pytest.raises(TrainingError, match="step 4: .*lora_B.* is NaN or inf after it"):
        train(tmp_path, rows, adapted(base), callbacks=[Spoils()])
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_state_that_no_file_can_hold_is_named(tmp_path, rows, base):
    class Odd(Callback):
        def state_dict(self):
            return {"model": object()}

    with pytest.raises(TrainingError, match=r"callbacks.Odd 0.model: expected numbers.*got object"):
        train(tmp_path, rows, adapted(base), callbacks=[Odd()])
