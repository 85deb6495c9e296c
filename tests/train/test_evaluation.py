"""When a run is evaluated, which evaluation is the best, and when no better one is waited for."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from safetensors.torch import load_file

from lowrank.errors import ConfigError, TrainingError
from lowrank.train import Callback, TrainConfig, Trainer

from .support import Small, examples, metrics_lines

transformers = pytest.importorskip("transformers", reason="the oracle; pip install transformers")


def config(path, **settings) -> TrainConfig:
    settings = {"max_steps": 10, "per_device_train_batch_size": 2, **settings}
    return TrainConfig(path / "run", warmup_ratio=0.0, learning_rate=1e-3, **settings)


class Scripted:
    """compute_metrics: returns the next of `values` as the score of each evaluation."""

    def __init__(self, values):
        self.values, self.states = list(values), []

    def __call__(self, model):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3)  # as one that generates would
        self.states.append(copy.deepcopy(model.state_dict()))
        return {"score": self.values[len(self.states) - 1]}


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({}, [0, 10]),
        ({"eval_strategy": "no", "eval_steps": 3}, [0, 10]),
        ({"eval_steps": 4}, [0, 4, 8, 10]),
        ({"eval_strategy": "steps", "eval_steps": 0.25}, [0, 3, 6, 9, 10]),
        ({"eval_strategy": "steps", "logging_steps": 5}, [0, 5, 10]),
        ({"eval_strategy": "epoch"}, [0, 4, 8, 10]),  # 7 examples: 4 steps
        ({"eval_strategy": "epoch", "gradient_accumulation_steps": 2}, [0, 2, 4, 6, 8, 10]),
    ],
)
def test_when_it_evaluates(tmp_path, generator, settings, steps):
    rows = examples(7, generator)
    result = Trainer(Small(), config(tmp_path, **settings), rows, rows[:2]).train()
    assert [step for step, _ in result.eval_losses] == steps


class Line(torch.nn.Module):
    """A model for transformers' Trainer, whose training is of no interest."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels=None):
        return {"loss": (self.weight - x).square().mean(), "logits": x}


def their_course(path, values, patience, threshold, greater):
    """Steps, best step and best score of transformers' Trainer over these scores, one a step."""
    scores = iter(values)
    arguments = transformers.TrainingArguments(
        output_dir=path, use_cpu=True, eval_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=greater,
        max_steps=len(values), save_only_model=True, save_total_limit=1, disable_tqdm=True,
        report_to="none", per_device_train_batch_size=2,
    )  # fmt: skip
    rows = [{"x": 1.0, "labels": 1.0}] * 4
    trainer = transformers.Trainer(
        Line(), arguments, train_dataset=rows, eval_dataset=rows[:1],
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[transformers.EarlyStoppingCallback(patience, threshold)],
    )  # fmt: skip
    trainer.train()
    return trainer.state.global_step, trainer.state.best_global_step, trainer.state.best_metric


@pytest.mark.parametrize(
    "patience, threshold, greater", [(2, 0.0, True), (2, 0.3, False), (3, 0.05, None)]
)
def test_the_best_and_the_end_are_those_of_transformers(
    tmp_path, generator, patience, threshold, greater
):
    values = (torch.rand(12, generator=generator) * 2).tolist()
    theirs = their_course(tmp_path / "theirs", values, patience, threshold, greater)
    score = Scripted([9.0, *values])  # before the first step: counts for nothing
    settings = config(
        tmp_path,
        max_steps=12,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=greater,
        early_stopping_patience=patience,
        early_stopping_threshold=threshold,
    )
    rows, model = examples(8, generator), Small()
    result = Trainer(model, settings, rows, rows[:2], compute_metrics=score).train()
    steps, best_step, best = theirs
    assert (len(result.losses), result.metrics["best_step"]) == (steps, best_step)
    assert result.metrics["best_metric"] == result.metrics["eval_score_after"] == best
    saved = load_file(tmp_path / "run" / "trained.safetensors")
    for name, value in score.states[best_step].items():
        assert torch.equal(saved[name], value) and torch.equal(model.state_dict()[name], value)
    found = [line["eval_score"] for line in metrics_lines(tmp_path / "run") if "eval_loss" in line]
    assert found == [9.0, *values][: steps + 1]


def test_the_best_is_that_of_the_held_out_loss(tmp_path, generator):
    """Trained on one thing and held out another, the loss has its minimum on the way."""
    rows, held_out = examples(6, generator), examples(6, generator)
    settings = config(tmp_path, max_steps=40, eval_steps=4, load_best_model_at_end=True)
    settings.learning_rate = 3e-2
    trainer = Trainer(Small(), settings, rows, held_out)
    result = trainer.train()
    step, loss = min(result.eval_losses[1:], key=lambda found: found[1])
    assert result.metrics["best_step"] == step < 40 and len(result.losses) == 40
    assert result.metrics["best_metric"] == result.metrics["eval_loss_after"] == loss
    assert trainer.evaluate() == loss < result.eval_losses[-1][1]


def test_stopping_early_without_the_best(tmp_path, generator, caplog):
    """What the last step left is saved."""
    caplog.set_level(logging.INFO)
    score = Scripted([0.0, 3.0, 2.0, 1.0, 0.0])
    names = {"metric_for_best_model": "eval_score", "early_stopping_patience": 2}
    rows = examples(8, generator)
    settings = config(tmp_path, eval_steps=2, **names)
    result = Trainer(Small(), settings, rows, rows, compute_metrics=score).train()
    assert len(result.losses) == 6 and result.metrics["best_step"] == 2
    assert result.metrics["eval_score_after"] == 1.0 and not result.interrupted
    assert "step 6: 2 evaluations without gain: the run ends here" in caplog.text
    saved = load_file(tmp_path / "run" / "trained.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in score.states[3].items())


def test_evaluating_changes_nothing_of_the_training(tmp_path, generator):
    """Nor do metrics that draw random numbers, nor the keeping of the best."""
    rows, model = examples(8, generator), Small(dropout=0.4)
    quiet = Trainer(copy.deepcopy(model), config(tmp_path / "a"), rows).train()
    settings = config(tmp_path / "b", eval_steps=1, load_best_model_at_end=True)
    score = Scripted([0.0] * 11)
    seen = Trainer(model, settings, rows, rows[:3], compute_metrics=score).train()
    assert seen.losses == quiet.losses and len(seen.losses) == 10


def test_metrics_that_are_none(tmp_path, generator):
    rows = examples(8, generator)
    for returned, error, message in (
        ({"score": float("nan")}, TrainingError, "step 0: the eval_score is nan"),
        ({"score": "high"}, ConfigError, "compute_metrics must return a dict of names and numbers"),
        (3.0, ConfigError, "compute_metrics must return a dict of names and numbers; got 3.0"),
    ):
        settings = config(tmp_path, overwrite_output_dir=True)
        with pytest.raises(error, match=message):
            Trainer(Small(), settings, rows, rows, compute_metrics=lambda _, r=returned: r).train()
    wanted = config(tmp_path / "b", eval_steps=1, metric_for_best_model="bleu")
    wanted.load_best_model_at_end = True
    with pytest.raises(ConfigError, match="metric_for_best_model is 'bleu', but .* has eval_loss:"):
        Trainer(Small(), wanted, rows, rows)
    trainer = Trainer(Small(), wanted, rows, rows, compute_metrics=lambda _: {"rouge": 0.5})
    with pytest.raises(ConfigError, match="'bleu', but .* has eval_loss, eval_rouge:"):
        trainer.train()
    lines = (tmp_path / "b" / "run" / "metrics.jsonl").read_text()
    assert '"step": 0' in lines and '"step": 1' not in lines


@pytest.mark.parametrize(
    "settings",
    [
        {"load_best_model_at_end": True, "eval_steps": 2},
        {"early_stopping_patience": 1, "eval_steps": 2},
        {"eval_strategy": "epoch"},
    ],
)
def test_what_needs_held_out_data_says_so(tmp_path, generator, settings):
    with pytest.raises(ConfigError, match=f"^{next(iter(settings))} needs held-out data"):
        Trainer(Small(), config(tmp_path, **settings), examples(8, generator))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["load_best_model_at_end", "early_stopping_patience"])
def test_what_needs_evaluations_says_so(name):
    with pytest.raises(ConfigError, match=f"{name} needs evaluations between .*set eval_str"):
        TrainConfig("out", **{name: True if name.startswith("load") else 3})


def test_an_interrupted_run_saves_its_best(tmp_path, generator):
    class Interrupts(Callback):
        def on_step_end(self, loop):
            if loop.history.steps == 5:
                loop.interrupt.requested = True

    score = Scripted([0.0, 1.0, 3.0, 2.0, 2.0, 1.0])
    rows = examples(8, generator)
    settings = config(tmp_path, eval_steps=1, load_best_model_at_end=True)
    settings.metric_for_best_model = "score"
    trainer = Trainer(
        Small(), settings, rows, rows, callbacks=[Interrupts()], compute_metrics=score
    )
    result = trainer.train()
    assert result.interrupted and result.metrics["best_step"] == 2
    saved = load_file(tmp_path / "run" / "trained.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in score.states[2].items())
