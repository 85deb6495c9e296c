"""seed, data_seed and full_determinism."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from lowrank.data import epoch_order
from lowrank.train import TrainConfig, Trainer

from .support import Small, examples


def config(path, **settings) -> TrainConfig:
    settings = {"max_steps": 5, "per_device_train_batch_size": 1, **settings}
    return TrainConfig(path, learning_rate=1e-2, **settings)


class Watched(Small):
    """Keeps what it is given, and rolls every die."""

    def __init__(self, dropout=0.0):
        super().__init__(dropout=dropout)
        self.seen, self.dice, self.deterministic = [], [], set()

    def forward(self, input_ids):
        import numpy as np

        self.seen.append(input_ids.tolist()[0])
        self.dice.append((random.random(), float(np.random.rand()), torch.rand(()).item()))
        self.deterministic.add(torch.are_deterministic_algorithms_enabled())
        return super().forward(input_ids)


def test_the_seed_is_of_every_generator(tmp_path, generator):
    rows, start = examples(8, generator), Watched()
    dice = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        model = copy.deepcopy(start)
        Trainer(model, config(tmp_path / name, seed=seed), rows).train()
        dice.append(model.dice)
    assert dice[0] == dice[1]
    for mine, others in zip(zip(*dice[0], strict=True), zip(*dice[2], strict=True), strict=True):
        assert not set(mine) & set(others)


def test_data_seed_is_of_the_order_alone(tmp_path, generator):
    rows, start = examples(8, generator), Watched()
    runs = {}
    for name, seeds in (("a", (1, None)), ("b", (1, 9)), ("c", (2, 9))):
        model = copy.deepcopy(start)
        settings = config(tmp_path / name, seed=seeds[0], data_seed=seeds[1])
        Trainer(model, settings, rows).train()
        runs[name] = model
    assert runs["a"].seen == [rows[i]["input_ids"] for i in epoch_order(8, 1, 0)[:5]]
    assert runs["b"].seen == runs["c"].seen
    assert runs["b"].seen == [rows[i]["input_ids"] for i in epoch_order(8, 9, 0)[:5]]
    assert runs["a"].dice == runs["b"].dice != runs["c"].dice


@pytest.mark.parametrize("before", [False, True])
def test_full_determinism_is_on_in_the_run_and_as_before_after_it(tmp_path, generator, before):
    rows, model = examples(8, generator), Watched()
    torch.use_deterministic_algorithms(before, warn_only=before)
    try:
        Trainer(model, config(tmp_path, full_determinism=True), rows, rows).train()
        assert model.deterministic == {True}
        assert torch.are_deterministic_algorithms_enabled() is before
        assert torch.is_deterministic_algorithms_warn_only_enabled() is before
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_operation_without_a_deterministic_form_is_refused(tmp_path, generator):
    class Scatters(Small):
        def forward(self, input_ids):
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
            return super().forward(input_ids)

    rows = examples(4, generator)
    Trainer(Scatters(), config(tmp_path / "a"), rows).train()
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        Trainer(Scatters(), config(tmp_path / "b", full_determinism=True), rows).train()
