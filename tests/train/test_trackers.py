"""What trackers are told. Small fakes of their documented calls stand for the packages."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import torch

from lowrank.errors import ConfigError, MissingPackageError, TrainingError
from lowrank.train import TrainConfig, Trainer
from lowrank.train.trackers import Trackers, check_installed, tracker_names

from .support import Small, examples

STEP = {"step": 3, "loss": 0.5, "learning_rate": 1e-4, "tokens": 60, "seconds": 0.5}
EVALUATION = {"step": 3, "eval_loss": 0.75}
TOLD = [
    ({"train/loss": 0.5, "train/learning_rate": 1e-4, "train/tokens": 60, "train/seconds": 0.5,
      "train/tokens_per_second": 120.0}, 3),
    ({"eval/loss": 0.75}, 3),
]  # fmt: skip


class Service:
    """Keeps what is logged, as a run of wandb and the module trackio do."""

    def __init__(self) -> None:
        self.logged, self.opened, self.ended = [], [], []

    def init(self, **options):
        self.opened.append(options)
        return self

    def log(self, values, step=None):
        self.logged.append((dict(values), step))

    def finish(self, exit_code=None):
        self.ended.append(exit_code)


class SummaryWriter:
    """The part of torch.utils.tensorboard's that is called."""

    made: list[SummaryWriter] = []

    def __init__(self, log_dir):
        self.log_dir, self.scalars, self.texts, self.closed = log_dir, [], [], False
        self.made.append(self)

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def add_text(self, tag, text):
        self.texts.append((tag, text))

    def close(self):
        self.closed = True


@pytest.fixture
def service(monkeypatch):
    """wandb and trackio, both of which this is."""
    service = Service()
    for name in ("wandb", "trackio"):
        module = ModuleType(name)
        module.init, module.log, module.finish = service.init, service.log, service.finish
        module.run = None
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return service


@pytest.fixture
def writers(monkeypatch):
    SummaryWriter.made = []
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return SummaryWriter.made


def told(trackers: Trackers, failed: bool = False) -> None:
    trackers.step(STEP)
    trackers.evaluation(EVALUATION)
    trackers.close(failed)
    trackers.close(failed)  # no more to end


def test_tensorboard_gets_curves_and_the_configuration(tmp_path, writers):
    told(Trackers(["tensorboard"], tmp_path, config={"r": 8}))
    (writer,) = writers
    assert writer.log_dir == str(tmp_path / "tensorboard") and writer.closed
    assert writer.scalars == [
        (name, v, step) for values, step in TOLD for name, v in values.items()
    ]
    assert writer.texts == [("config", '```\n{\n  "r": 8\n}\n```')]


@pytest.mark.parametrize("failed", [False, True])
def test_wandb_gets_a_run_and_how_it_ended(tmp_path, service, failed):
    told(Trackers(["wandb"], tmp_path, "plants", "third", {"r": 8}), failed)
    assert service.opened == [
        {"project": "plants", "name": "third", "dir": str(tmp_path), "config": {"r": 8}}
    ]
    assert service.logged == TOLD and service.ended == [int(failed)]


def test_wandbs_own_variable_names_the_project(tmp_path, service, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "trees")
    Trackers(["wandb"], tmp_path, "plants")
    assert service.opened[0]["project"] == "trees"


def test_an_open_run_of_wandb_is_used_and_left_open(tmp_path, service):
    sys.modules["wandb"].run = service
    told(Trackers(["wandb"], tmp_path))
    assert service.opened == [] and service.logged == TOLD and service.ended == []


def test_trackio_gets_a_run(tmp_path, service):
    told(Trackers(["trackio"], tmp_path, "plants", "third", {"r": 8}))
    assert service.opened == [
        {"project": "plants", "name": "third", "config": {"r": 8}, "embed": False}
    ]
    assert service.logged == TOLD and service.ended == [None]


def test_one_that_fails_is_given_up_and_the_others_go_on(tmp_path, service, writers, caplog):
    def broken(**options):
        raise OSError("no\nnetwork")

    sys.modules["trackio"].init = broken
    trackers = Trackers(["trackio", "wandb", "tensorboard"], tmp_path)
    assert "report_to: trackio failed and is told no more: no network" in caplog.text

    def log(values, step):
        raise ValueError

    service.log = log
    told(trackers)
    assert "report_to: wandb failed and is told no more: ValueError" in caplog.text
    assert len(caplog.records) == 2 and writers[0].closed and len(writers[0].scalars) == 6


def test_names():
    assert tracker_names(None) == tracker_names("none") == tracker_names([]) == []
    assert tracker_names("wandb") == ["wandb"]
    assert tracker_names(["wandb", "tensorboard"]) == ["wandb", "tensorboard"]
    for wrong in ("mlflow", ["wandb", "none"], 3, {"wandb": 1}, ["wandb", ["trackio"]]):
        with pytest.raises(ConfigError, match="^report_to must be none or some of tensorboard, "):
            TrainConfig("out", report_to=wrong)


@pytest.mark.parametrize(
    ("name", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")],
)
def test_a_missing_package_is_named(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=rf"report_to='{name}' .*: pip install {name}$"):
        check_installed([name])


def test_a_run_tells_every_step(tmp_path, service, generator):
    """Under the name of its directory, with the resolved configuration, and whether it failed."""
    rows = examples(9, generator)
    config = TrainConfig(tmp_path / "third", max_steps=3, report_to=["wandb"], project="plants")
    trainer = Trainer(Small(), config, rows, rows[:3])
    result = trainer.train()
    (opened,) = service.opened
    assert (opened["project"], opened["name"]) == ("plants", "third")
    assert opened["config"] == json.loads((tmp_path / "third" / "train_config.json").read_text())
    steps = [
        (values["train/loss"], step) for values, step in service.logged if "train/loss" in values
    ]
    assert steps == list(zip(result.losses, (1, 2, 3), strict=True))
    evaluated = [
        (step, values["eval/loss"]) for values, step in service.logged if "eval/loss" in values
    ]
    assert evaluated == result.eval_losses and service.ended == [0]

    with torch.no_grad():
        trainer.model.head.bias[0] = torch.nan
    config.overwrite_output_dir, config.run_name = True, "fourth"
    with pytest.raises(TrainingError, match="nan"):
        trainer.train()
    assert service.opened[1]["name"] == "fourth" and service.ended == [0, 1]


def test_what_is_not_installed_is_said_before_anything_is_written(tmp_path, generator, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = TrainConfig(tmp_path / "run", report_to="trackio")
    with pytest.raises(MissingPackageError, match="pip install trackio"):
        Trainer(Small(), config, examples(4, generator))
    assert list(tmp_path.iterdir()) == []
