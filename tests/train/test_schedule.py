"""Learning-rate schedules against transformers'."""

from __future__ import annotations

import pytest
import torch

from lowrank.errors import ConfigError
from lowrank.train import TrainConfig, Trainer, lr_multiplier

from .support import Small, examples, metrics_lines

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install transformers"
)


CASES = [
    ("linear", {}),
    ("cosine", {}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.25}),
    ("cosine_with_min_lr", {"min_lr": 0.04}),
    ("warmup_stable_decay", {"num_decay_steps": 7}),
    ("warmup_stable_decay", {"num_decay_steps": 11, "min_lr_ratio": 0.1, "decay_type": "1-sqrt"}),
    ("warmup_stable_decay", {"num_decay_steps": 60, "min_lr_ratio": 0.3, "decay_type": "linear"}),
]


def their_rates(name: str, total: int, warmup: int, lr: float, options=None) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler = transformers.get_scheduler(name, optimizer, warmup, total, options or {})
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name, options", [c for c in CASES if "min_lr" not in c[1]])
@pytest.mark.parametrize("total, warmup", [(1, 0), (7, 0), (63, 1), (100, 37), (20, 20), (12, 30)])
def test_equals_transformers(name, options, total, warmup):
    ours = [lr_multiplier(name, step, total, warmup, options) for step in range(total)]
    theirs = their_rates(name, total, warmup, 1.0, options)
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name, options", CASES)
def test_a_run_takes_the_schedule(tmp_path, generator, name, options):
    config = TrainConfig(
        tmp_path / "run",
        max_steps=17,
        learning_rate=0.05,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=options,
        warmup_steps=3,
    )
    Trainer(Small(), config, examples(6, generator)).train()
    rates = [line["learning_rate"] for line in metrics_lines(tmp_path / "run")]
    expected = their_rates(name, 17, 3, 0.05, options)
    assert rates == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_the_defaults_of_the_options():
    """Down to a tenth, and down to 0 in the last tenth."""
    assert lr_multiplier("cosine_with_min_lr", 99, 100, 0) == pytest.approx(0.1, rel=0.01)
    rates = [lr_multiplier("warmup_stable_decay", step, 100, 0) for step in range(100)]
    assert rates[:91] == [1.0] * 91 and rates[91] < 1.0 and rates[99] < 0.1


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("cosine", {"min_lr": 0.1}, "has 'min_lr', but cosine takes none: leave it out"),
        ("warmup_stable_decay", {"decay": 3}, "takes num_decay_steps, min_lr_ratio, decay_type"),
        ("warmup_stable_decay", {"decay_type": "exp"}, "be one of linear, cosine, 1-sqrt; got 'e"),
        ("warmup_stable_decay", {"num_decay_steps": -1}, "must be a whole number of steps, or"),
        ("cosine_with_min_lr", {"min_lr_rate": 1.5}, "must be a number from 0 to 1; got 1.5"),
        ("cosine_with_min_lr", {"min_lr": 1, "min_lr_rate": 0.1}, "leave one of them out"),
        ("cosine_with_min_lr", {"min_lr": 1}, "must be at most learning_rate=0.0002; got 1"),
        ("cosine", ["min_lr"], "must be None or a dict of names; got"),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, message):
    with pytest.raises(ConfigError, match="^lr_scheduler_kwargs") as caught:
        TrainConfig("out", lr_scheduler_type=name, lr_scheduler_kwargs=options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings, warmup",
    [
        ({"warmup_ratio": 0.25}, 3),  # 2.5 steps, rounded up as transformers does
        ({"warmup_steps": 4, "warmup_ratio": 0.9}, 4),
        ({"warmup_steps": 0.5}, 5),
        ({"warmup_ratio": 0.0}, 0),
    ],
)
def test_the_rates_of_a_run(tmp_path, generator, settings, warmup):
    config = TrainConfig(tmp_path / "run", max_steps=10, learning_rate=3e-3, **settings)
    Trainer(Small(), config, examples(6, generator)).train()
    rates = [line["learning_rate"] for line in metrics_lines(tmp_path / "run")]
    assert rates == pytest.approx(their_rates("cosine", 10, warmup, 3e-3), rel=1e-12, abs=1e-15)
