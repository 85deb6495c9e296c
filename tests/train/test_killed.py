"""A real run, killed at random moments and started again, ends as if it had never been."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from .support import metrics_lines

STEPS, KILLS = 400, 20


def start(folder) -> subprocess.Popen:
    """The run in a process of its own, ready for its next step."""
    words = [sys.executable, "-m", "tests.train.killed_run", str(folder), str(STEPS)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def outcome(folder):
    """All that a run leaves and that no clock decides."""
    changing = {"seconds", "peak_memory_bytes"}
    metrics = [
        {k: v for k, v in line.items() if k not in changing} for line in metrics_lines(folder)
    ]
    results = json.loads((folder / "results.json").read_text())
    files = sorted(path.name for path in folder.iterdir())
    last = folder / f"checkpoint-{STEPS}"
    weights = [(at / "trained.safetensors").read_bytes() for at in (folder, last)]
    return metrics, results["train_loss"], results["eval_loss_after"], files, weights


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, seed):
    begin = time.monotonic()
    _, errors = start(tmp_path / "whole").communicate()
    assert (tmp_path / "whole" / "results.json").exists(), errors
    length = time.monotonic() - begin
    clock, reached = random.Random(seed), []
    for _ in range(KILLS):
        process = start(tmp_path / "killed")
        time.sleep(clock.uniform(0, length / KILLS))  # half of the way, when all is done
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        reached.append(
            max((line["step"] for line in metrics_lines(tmp_path / "killed")), default=0)
        )
    assert reached[-1] > STEPS / 20, reached  # it gets on, killed as it is
    process = start(tmp_path / "killed")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
