"""The files of a run: when it is repeated, when it is interrupted, when a package is missing."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import signal
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

import lowrank
from lowrank.errors import ConfigError
from lowrank.io.atomic import write_files
from lowrank.train import TrainConfig, Trainer, check_output_dir, held_out_loss
from lowrank.train.checkpoint import checkpoints
from lowrank.train.progress import Progress
from lowrank.train.run import RunDirectory

from .support import Bytes, Small, examples, metrics_lines


class Saving(Bytes):
    def save(self, directory):
        (directory / "tokenizer.json").write_text("{}")


def run(tmp_path, generator, model=None, tokenizer=None, **settings):
    rows = examples(9, generator)
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, **settings}
    config = TrainConfig(tmp_path / "run", **settings)
    return Trainer(model or Small(), config, rows, rows[:3], tokenizer=tokenizer).train()


def test_a_run_leaves_its_files(tmp_path, generator):
    model = Small()
    model.embed.requires_grad_(False)
    result = run(tmp_path, generator, model, Saving(), learning_rate=1e-3)
    names = {path.name for path in result.output_dir.iterdir()}
    assert names == {
        "train_config.json", "metrics.jsonl", "results.json", "loss.png", "trained.safetensors",
        "tokenizer.json", "checkpoint-4",
    }  # fmt: skip
    saved = load_file(result.output_dir / "trained.safetensors")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], p) for name, p in trained.items())
    assert json.loads((result.output_dir / "results.json").read_text()) == result.metrics
    resolved = json.loads((result.output_dir / "train_config.json").read_text())
    again = TrainConfig(**resolved["train"])
    assert again.learning_rate == 1e-3 and again.to_dict() == resolved["train"]
    assert resolved["versions"]["torch"] == torch.__version__
    assert resolved["total_steps"] == 4 and resolved["train_examples"] == 9
    assert (result.output_dir / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "adapter_config.json"])
def test_a_directory_with_others_files_is_refused_and_kept(tmp_path, generator, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"would replace \({name}\): name another"):
        run(tmp_path, generator)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_a_directory_that_holds_a_run_is_refused_and_kept(tmp_path, generator):
    first = run(tmp_path, generator)
    files = [path for path in first.output_dir.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    with pytest.raises(
        ConfigError,
        match=r"already holds a run \(metrics.jsonl, trained.safetensors, checkpoint-4\)",
    ):
        run(tmp_path, generator)
    assert before == {path: path.read_bytes() for path in files}
    second = run(tmp_path, generator, overwrite_output_dir=True, max_steps=2)
    assert not (second.output_dir / "checkpoint-4").exists()
    assert [line["step"] for line in metrics_lines(second.output_dir)] == [0, 1, 2, 2]


def test_a_directory_with_other_files_is_no_run(tmp_path, generator):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run(tmp_path, generator)
    run(tmp_path, generator, overwrite_output_dir=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_what_a_killed_run_left_aside_goes(tmp_path, generator):
    (tmp_path / "run").mkdir()
    if not os.fork():
        write_files(tmp_path / "run", {"metrics.jsonl": lambda path: os._exit(0)})
    os.wait()
    (left,) = (tmp_path / "run").iterdir()
    run(tmp_path, generator)
    assert not left.exists()


def test_a_file_is_no_directory(tmp_path, generator):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="output_dir must be a directory; .* is a file"):
        check_output_dir(tmp_path / "run", overwrite=True)
    config = TrainConfig(tmp_path / "run" / "deeper")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        Trainer(Small(), config, examples(4, generator)).train()


def test_without_matplotlib_the_run_goes_on(tmp_path, generator, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(tmp_path, generator)
    assert not (result.output_dir / "loss.png").exists()
    assert (result.output_dir / "trained.safetensors").exists()
    assert "pip install 'lowrank-torch[plots]'" in caplog.text


class Terminal:
    """A stderr that says it is a terminal, and keeps what is written."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def isatty(self):
        return True

    def flush(self):
        pass


def test_a_bar_on_a_terminal_lines_elsewhere(tmp_path, generator, monkeypatch, caplog):
    pytest.importorskip("tqdm", reason="needs tqdm: pip install tqdm")
    caplog.set_level(logging.INFO, "lowrank.train")
    run(tmp_path / "a", generator, max_steps=25)
    steps = [r.getMessage().split(":")[0] for r in caplog.records if "grad norm" in r.getMessage()]
    assert steps == ["step 1/25", "step 10/25", "step 20/25", "step 25/25"]

    caplog.clear()
    run(tmp_path / "shares", generator, max_steps=25, logging_steps=0.5, save_steps=0.4)
    steps = [r.getMessage().split(":")[0] for r in caplog.records if "grad norm" in r.getMessage()]
    assert steps == ["step 1/25", "step 13/25", "step 25/25"]
    assert [path.name for path in checkpoints(tmp_path / "shares" / "run")] == [
        "checkpoint-25", "checkpoint-20",
    ]  # fmt: skip

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "80")  # where tqdm, before 4.70, looks
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((80, 24)))
    caplog.clear()
    run(tmp_path / "b", generator)
    assert "held-out loss" in terminal.text
    last = [line for line in re.split(r"[\r\n]+", terminal.text) if line.startswith("4/4 ")][-1]
    assert len(last) <= 80
    assert re.search(r"\d\d:\d\d<\d\d:\d\d, loss \S+ lr \S+ norm \S+ \d+k? tok/s \S+ GiB$", last)
    assert "grad norm" not in caplog.text
    for speed, shown in [(9999, "9999 tok/s"), (9999.5, "10k tok/s"), (123_456, "123k tok/s")]:
        progress = Progress(9999, every=1, disable=False)
        line = {"loss": 12.3456, "learning_rate": 1e-3, "grad_norm": 1.234, "step": 1}
        progress.step(line | {"tokens": speed, "seconds": 1.0, "peak_memory_bytes": 12 * 2**30})
        progress.close()
        lines = re.split(r"[\r\n]+", terminal.text)
        last = [line for line in lines if line.startswith("1/9999 ")][-1]
        assert f" {shown} 12 GiB" in last and len(last) <= 80
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    run(tmp_path / "c", generator)
    assert "\r" not in terminal.text and "step 4/4: loss" in caplog.text


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_bars_over_tokenizing_and_evaluating(tmp_path, monkeypatch, disable_tqdm):
    """One over each; none where they are not wanted."""
    tqdm = pytest.importorskip("tqdm", reason="needs tqdm: pip install tqdm")
    drawn, bar = [], tqdm.tqdm

    def at_once(*args, **options):
        drawn.append((options["desc"], bool(options["disable"])))
        return bar(*args, **options | {"delay": 0})

    monkeypatch.setattr(tqdm, "tqdm", at_once)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    config = TrainConfig(tmp_path / "run", token_cache="none", disable_tqdm=disable_tqdm)
    model, rows = Small(), [{"text": "a few words"}] * 3
    trainer = Trainer(model, config, rows, rows, tokenizer=Bytes())
    trainer.evaluate()
    names = ["tokenizing", "tokenizing", "evaluating"]
    assert drawn == [(name, disable_tqdm) for name in names]
    assert all((f"{name}: " in terminal.text) != disable_tqdm for name in names)
    held_out_loss(model, trainer.eval_data)
    assert drawn[3:] == [("evaluating", False)]


def test_a_bar_over_an_evaluation_that_takes_long(tmp_path, generator, monkeypatch):
    pytest.importorskip("tqdm", reason="needs tqdm: pip install tqdm")

    class Slow(Small):
        def forward(self, input_ids):
            time.sleep(0.8)
            return super().forward(input_ids)

    rows = examples(4, generator)
    config = TrainConfig(tmp_path / "run", per_device_eval_batch_size=1)
    trainer = Trainer(Slow(), config, rows, rows)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    trainer.evaluate()
    assert "evaluating: " in terminal.text and "4/4" in terminal.text


class Interrupted(Small):
    """Sends a signal `times` times in forward number `call`."""

    def __init__(self, call, times=1, number=signal.SIGINT):
        super().__init__()
        self.call, self.times, self.number, self.calls, self.kept = call, times, number, 0, []

    def forward(self, input_ids):
        self.kept.append(copy.deepcopy(self.state_dict()))
        self.calls += 1
        if self.calls == self.call:
            for _ in range(self.times):
                signal.raise_signal(self.number)
        return super().forward(input_ids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step(tmp_path, generator, caplog, number):
    """In the first of step 2's two batches: that step is taken, and what it made is saved."""
    rows = examples(12, generator)
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    model = Interrupted(call=3, number=number)
    handler = signal.getsignal(number)
    config = TrainConfig(tmp_path / "run", warmup_ratio=0.0, **settings)
    result = Trainer(model, config, rows).train()
    assert result.interrupted and len(result.losses) == 2
    assert result.metrics["interrupted"] is True and result.metrics["steps"] == 2
    assert "interrupted after 2 of 6 steps" in caplog.text
    assert [line["step"] for line in metrics_lines(tmp_path / "run")] == [1, 2]
    saved = load_file(tmp_path / "run" / "trained.safetensors")
    assert len(model.kept) == 4
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.items())
    assert any(not torch.equal(value, model.kept[-1][name]) for name, value in saved.items())
    assert signal.getsignal(number) is handler


def test_ctrl_c_before_the_first_step_saves_nothing(tmp_path, generator, caplog):
    rows = examples(12, generator)
    config = TrainConfig(tmp_path / "run", max_steps=6, per_device_eval_batch_size=2)
    result = Trainer(Interrupted(call=2), config, rows, rows).train()
    assert result.interrupted and result.losses == [] and result.eval_losses == []
    assert "interrupted after 0 of 6 steps: nothing was trained, nothing is saved" in caplog.text
    assert not (tmp_path / "run" / "trained.safetensors").exists()
    check_output_dir(tmp_path / "run")


def test_a_second_ctrl_c_stops_at_once(tmp_path, generator):
    handler = signal.getsignal(signal.SIGINT)
    config = TrainConfig(tmp_path / "run", max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        Trainer(Interrupted(call=3, times=2), config, examples(12, generator)).train()
    assert [line["step"] for line in metrics_lines(tmp_path / "run")] == [1, 2]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "train_config.json",
        "metrics.jsonl",
    }
    assert signal.getsignal(signal.SIGINT) is handler


def test_training_in_a_thread_leaves_signals_alone(tmp_path, generator):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path, generator)))
    thread.start()
    thread.join()
    assert len(results[0].losses) == 4


@pytest.mark.parametrize("lines", ["", '{"step": 0, "eval_loss": 5.5}\n', '{"step": 0, "eval'])
def test_a_run_that_ended_before_its_first_step_is_in_nobodys_way(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text(lines)
    check_output_dir(tmp_path)
    RunDirectory(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    (tmp_path / "metrics.jsonl").write_text(lines + '\n{"step": 1, "loss": 5.0}\n')
    with pytest.raises(ConfigError, match="already holds a run"):
        check_output_dir(tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["embed"]}, {"trainable_token_indices": {"embed": [3, 7, 9]}}],
)
def test_what_an_adapter_replaces_is_saved_with_it(tmp_path, generator, options):
    base = Small()
    config = lowrank.LoRAConfig(r=2, target_modules=["head"], **options)
    model = lowrank.inject(copy.deepcopy(base), config)
    result = run(tmp_path, generator, model, learning_rate=1e-2)
    assert not (result.output_dir / "trained.safetensors").exists()
    again = lowrank.load_adapter(base, result.output_dir).eval()
    ids = torch.randint(2, 12, (2, 9), generator=generator)
    assert torch.equal(again(ids), model.eval()(ids))
    with torch.no_grad(), lowrank.disable_adapters(again):
        assert not torch.equal(again(ids), model(ids))
