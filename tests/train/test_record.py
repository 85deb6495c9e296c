"""What a run writes and shows of each step, and how a later one goes on with it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from lowrank.train.feed import Counts
from lowrank.train.history import History
from lowrank.train.plots import run_figure, running_mean
from lowrank.train.progress import Progress, duration
from lowrank.train.record import Record
from lowrank.train.run import RunDirectory, metrics_lines

COUNTS = Counts(examples=4, tokens=42, labelled=38)


def take_steps(record: Record, history: History, losses: list[float]) -> None:
    for loss in losses:
        history.add(COUNTS, loss, seconds=0.25)
        record.step(COUNTS, loss, grad_norm=1.5, lr=1e-3, seconds=0.25)


def evaluate(record: Record, history: History, loss: float) -> None:
    history.evaluations.append({"step": history.steps, "eval_loss": loss})
    record.evaluation()


def record_of(run: RunDirectory, history: History) -> Record:
    cpu = torch.device("cpu")
    return Record(run, history, 5, examples=8, log_every=10, quiet=True, device=cpu)


def untimed(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "peak_memory_bytes"} for line in lines]


def test_a_resumed_record_is_that_of_one_run(tmp_path):
    """Killed in the middle of step 5's line, resumed from a checkpoint of step 3."""
    losses, linear = [3.0, 2.5, 0.1 + 0.2, 1.75, 1.5], torch.nn.Linear(2, 3)
    whole, history = RunDirectory(tmp_path / "whole"), History()
    record = record_of(whole, history)
    evaluate(record, history, 4.0)
    take_steps(record, history, losses)
    evaluate(record, history, 1.25)
    expected = record.result(linear.parameters(), False)
    record.close()
    whole.close()

    run, history = RunDirectory(tmp_path / "run"), History()
    record = record_of(run, history)
    evaluate(record, history, 4.0)
    take_steps(record, history, losses[:3])
    kept = copy.deepcopy(history)
    take_steps(record, history, [9.0, 9.0])
    run.close()
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    (tmp_path / "run" / "adapter_model.safetensors").write_text("of before")

    lines = metrics_lines(tmp_path / "run", last=3)
    run = RunDirectory(tmp_path / "run", lines)
    assert (tmp_path / "run" / "adapter_model.safetensors").read_text() == "of before"
    assert [line["step"] for line in metrics_lines(tmp_path / "run")] == [0, 1, 2, 3]
    record = record_of(run, kept)
    take_steps(record, kept, losses[3:])
    evaluate(record, kept, 1.25)
    result = record.result(linear.parameters(), False)
    run.close()
    assert untimed(metrics_lines(tmp_path / "run")) == untimed(metrics_lines(tmp_path / "whole"))
    assert result.losses == losses and result.eval_losses == [(0, 4.0), (5, 1.25)]
    clocks = ("wall_seconds", "peak_memory_bytes")
    assert {k: v for k, v in result.metrics.items() if k not in clocks} == {
        k: v for k, v in expected.metrics.items() if k not in clocks
    }


def test_lines_of_a_file_that_is_torn_or_missing(tmp_path):
    assert metrics_lines(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n\xff\n7\n{"step": 2, "lo')
    assert metrics_lines(tmp_path) == [{"step": 1, "loss": 2.0}]
    assert metrics_lines(tmp_path, last=0) == []


def test_lines_of_the_log_say_how_long_it_takes(caplog):
    caplog.set_level(logging.INFO, "lowrank.train")
    progress = Progress(total=100, every=2, disable=True)
    for step in range(1, 5):
        line = {"step": step, "loss": 1.0, "learning_rate": 1e-3, "grad_norm": 2.0, "tokens": 90}
        progress.step(line | {"seconds": 0.5 * step, "peak_memory_bytes": 3 * 2**29})
    assert caplog.messages[-1] == (
        "step 4/100: loss 1.0000, lr 1.00e-03, grad norm 2.000, 72 tokens/s, 1.50 GiB, 2 min left"
    )
    assert len(caplog.messages) == 3  # the first, and every second
    progress.step(
        line
        | {"step": 100, "seconds": 1.0, "peak_memory_bytes": 0, "peak_device_memory_bytes": 2**31}
    )
    assert caplog.messages[-1].endswith("75 tokens/s, 2.00 GiB")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5399, "1 h 30 min"), (36000, "10 h 0 min")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_the_picture_has_losses_and_the_learning_rate():
    """Its lines hold what metrics.jsonl does; long runs are smoothed."""
    lines = [{"step": 0, "eval_loss": 3.0}]
    lines += [{"step": n, "loss": 3 - n / 50, "learning_rate": n / 1e4} for n in range(1, 81)]
    lines += [{"step": 80, "eval_loss": 2.0}]
    above, below = run_figure(lines).axes
    raw, smooth, held_out = (line.get_xydata().tolist() for line in above.lines)
    assert raw == [[line["step"], line["loss"]] for line in lines[1:-1]]
    assert smooth[10] == pytest.approx([11, sum(3 - n / 50 for n in (8, 9, 10, 11)) / 4])
    assert held_out == [[0, 3.0], [80, 2.0]]
    assert below.lines[0].get_xydata().tolist() == [[n, n / 1e4] for n in range(1, 81)]
    assert len(run_figure(lines[1:10]).axes[0].lines) == 1
    assert running_mean([4.0, 2.0, 0.0], 2) == [4.0, 3.0, 1.0]
