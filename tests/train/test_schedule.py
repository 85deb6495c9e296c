"""Learning-rate schedules against transformers'."""

from __future__ import annotations

import pytest
import torch

from lowrank.train import TrainConfig, Trainer, lr_multiplier

from .support import Small, examples, metrics_lines

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install transformers"
)


def their_rates(name: str, total: int, warmup: int, lr: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    function = {
        "linear": transformers.get_linear_schedule_with_warmup,
        "cosine": transformers.get_cosine_schedule_with_warmup,
    }.get(name)
    if function:
        scheduler = function(optimizer, num_warmup_steps=warmup, num_training_steps=total)
    else:
        scheduler = transformers.get_constant_schedule_with_warmup(
            optimizer, num_warmup_steps=warmup
        )
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total, warmup", [(1, 0), (7, 0), (63, 1), (100, 37), (20, 20), (12, 30)])
def test_equals_transformers(name, total, warmup):
    ours = [lr_multiplier(name, step, total, warmup) for step in range(total)]
    assert ours == pytest.approx(their_rates(name, total, warmup, 1.0), rel=1e-12, abs=1e-15)


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
