"""Schedules against transformers', and settings that cannot be."""

from __future__ import annotations

import pytest
import torch

from lowrank.errors import ConfigError
from lowrank.train import TrainConfig, Trainer, lr_multiplier

from .support import Small, examples, metrics_lines

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")


def their_rates(name: str, total: int, warmup: int, lr: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    function = {
        "linear": transformers.get_linear_schedule_with_warmup,
        "cosine": transformers.get_cosine_schedule_with_warmup,
    }.get(name)
    if function:
        scheduler = function(optimizer, num_warmup_steps=warmup, num_training_steps=total)
    else:
        scheduler = transformers.get_constant_schedule_with_warmup(optimizer, num_warmup_steps=warmup)
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
        ({"warmup_ratio": 0.25}, 3),                       # 2.5 steps, rounded up as transformers does
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


@pytest.mark.parametrize(
    "name, value",
    [
        ("output_dir", ""), ("output_dir", 3), ("overwrite_output_dir", 1), ("learning_rate", "2e-4"),
        ("learning_rate", -1.0), ("learning_rate", float("nan")), ("lr_scheduler_type", "cosin"),
        ("lr_scheduler_type", None), ("warmup_ratio", 1.5), ("warmup_steps", -1), ("warmup_steps", 2.5),
        ("num_train_epochs", 0), ("num_train_epochs", float("inf")), ("max_steps", 0), ("max_steps", 10.0),
        ("max_steps", -2), ("per_device_train_batch_size", 0), ("per_device_eval_batch_size", True),
        ("gradient_accumulation_steps", 1.0), ("optim", "adam"), ("weight_decay", -0.1), ("adam_beta1", 1.0),
        ("adam_beta2", -0.5), ("adam_epsilon", None), ("max_grad_norm", float("inf")), ("bf16", "true"),
        ("gradient_checkpointing", 0), ("max_length", 0), ("padding_free", None), ("eval_steps", 0),
        ("completion_only_loss", "no"), ("logging_steps", 0), ("disable_tqdm", 2), ("seed", -1), ("seed", 2**63),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name} must be .*; got ") as caught:
        TrainConfig(**{"output_dir": "out", name: value})
    assert repr(value) in str(caught.value) and "\n" not in str(caught.value)


def test_every_setting_is_described():
    """The command line takes its help from these lines."""
    doc = TrainConfig.__doc__
    for name in TrainConfig.__dataclass_fields__:
        assert f"    {name}: " in doc or f"    {name}, " in doc or f", {name}: " in doc, name
