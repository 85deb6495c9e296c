"""auto_find_batch_size: smaller batches where memory does not suffice, and the same run."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from lowrank.errors import TrainingError
from lowrank.train import Callback, TrainConfig, Trainer

from .support import Small, examples, metrics_lines


class Limited(Small):
    """Takes `most` examples at a time; for more, what a GPU or a CPU raises."""

    def __init__(self, most, on_cpu=False):
        super().__init__()
        self.most, self.sizes, self.failed = most, [], []
        self.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        if on_cpu:
            self.error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")

    def forward(self, input_ids):
        if len(input_ids) > self.most:
            self.failed.append(len(input_ids))
            raise self.error
        self.sizes.append(len(input_ids))
        return super().forward(input_ids)


def config(path, **settings) -> TrainConfig:
    settings = {"max_steps": 5, "per_device_train_batch_size": 8, **settings}
    return TrainConfig(path, learning_rate=1e-2, auto_find_batch_size=True, **settings)


@pytest.mark.parametrize(
    "most, sizes, accumulation, on_cpu",
    [(4, [4], 2, False), (3, [4, 2], 1, True), (1, [4, 2, 1], 2, True)],
)
def test_smaller_batches_learn_the_same(
    tmp_path, generator, caplog, most, sizes, accumulation, on_cpu
):
    """13 examples: the last step of each epoch is short. Announced once for each halving."""
    rows, model = examples(13, generator), Limited(99, on_cpu).double()
    settings = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.5}
    whole = copy.deepcopy(model)
    expected = Trainer(whole, config(tmp_path / "whole", **settings), rows).train()
    model.most = most
    with caplog.at_level(logging.WARNING):
        result = Trainer(model, config(tmp_path / "run", **settings), rows).train()
    torch.testing.assert_close(result.losses, expected.losses, rtol=1e-10, atol=0)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert model.failed == [8, 4, 2][: len(sizes)]
    assert max(model.sizes) == sizes[-1]
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert len(said) == len(sizes)
    count = 8 * accumulation // sizes[0]
    assert said[0] == (
        f"step 1: out of memory: batches of 4 in place of 8 from here on, {count} to a step, "
        "which learns the same"
    )
    tokens = [line["tokens"] for line in metrics_lines(tmp_path / "whole")]
    assert [line["tokens"] for line in metrics_lines(tmp_path / "run")] == tokens


def test_memory_that_does_not_suffice_for_one_ends_the_run(tmp_path, generator):
    model = Limited(0)
    with pytest.raises(TrainingError, match="^out of memory in step 1: ") as caught:
        Trainer(model, config(tmp_path / "run"), examples(9, generator)).train()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert model.failed == [8, 4, 2, 1] and all(p.grad is None for p in model.parameters())


def test_nothing_is_halved_if_nobody_asked(tmp_path, generator):
    model = Limited(4)
    settings = TrainConfig(tmp_path / "run", max_steps=2)
    with pytest.raises(TrainingError, match="^out of memory in step 1: per_device_train_batch_siz"):
        Trainer(model, settings, examples(9, generator)).train()
    assert model.failed == [8]


def test_another_error_is_no_lack_of_memory(tmp_path, generator):
    model = Limited(4)
    model.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Trainer(model, config(tmp_path / "run"), examples(9, generator)).train()
    assert model.failed == [8]


def test_evaluations_take_smaller_batches_too(tmp_path, generator, caplog):
    rows, held_out = examples(9, generator), examples(11, generator)
    model = Limited(99).double()
    before = Trainer(copy.deepcopy(model), config(tmp_path / "a"), rows, held_out).evaluate()
    model.most = 3
    settings = config(tmp_path / "b", per_device_train_batch_size=2)
    trainer = Trainer(model, settings, rows, held_out)
    with caplog.at_level(logging.WARNING):
        assert trainer.evaluate() == pytest.approx(before, rel=1e-12)
        trainer.train()
    assert model.failed == [8, 4]
    assert "out of memory: evaluating in batches of 2 from here on" in caplog.text


def test_a_paged_optimizer_gives_way_before_batches_do(tmp_path, generator, caplog):
    """Once: what it has given back cannot be given again."""

    class Pages(Callback):
        def __init__(self):
            self.held = [1024, 0, 0]

        def on_train_begin(self, loop):
            loop.update.optimizer.evict = lambda: self.held.pop(0)

    rows, model, pages = examples(9, generator), Limited(4), Pages()
    with caplog.at_level(logging.WARNING):
        Trainer(model, config(tmp_path / "run"), rows, callbacks=[pages]).train()
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert said[0] == "step 1: out of memory: the states of the optimizer leave the device"
    assert "batches of 4 in place of 8" in said[1] and pages.held == [0]
    assert model.failed == [8, 8]
