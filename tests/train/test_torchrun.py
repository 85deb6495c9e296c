"""The command under torchrun: a rank that is killed, and a run that goes on after it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lowrank.cli.demo import TINY
from lowrank.io.safetensors import load_safetensors

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
RUN = [*TORCHRUN, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # any free port
ALONE = [*TORCHRUN, "--standalone"]
TRAIN = ["-m", "lowrank", "train"]


def words_of(model: Path, data: Path, out: Path, **settings) -> list[str]:
    """The command `lowrank train` without what runs it."""
    settings = {"model": model, "data": data, "output_dir": out, "quantizer": "nf4", **settings}
    pairs = [("--" + name.replace("_", "-"), str(value)) for name, value in settings.items()]
    return [*TRAIN, *(word for pair in pairs for word in pair)]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_safetensors(folder / "adapter_model.safetensors")


@pytest.fixture
def data(tmp_path) -> Path:
    pairs = [{"prompt": f"{n}?", "completion": "A number. " * (1 + n % 5)} for n in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tmp_path / "data.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("restarts, torchrun", [(0, RUN), (1, RUN), (1, ALONE)])
def test_a_rank_is_killed(tmp_path, data, restarts, torchrun):
    """The other one says so at once; what goes on from the checkpoint ends as if nothing had been.

    Started again by hand, or by torchrun.
    """
    common = {"max_steps": 200, "save_steps": 20, "lora_dropout": 0.1, "resume": "auto"}
    common |= {"per_device_train_batch_size": 2, "ddp_timeout": 60}
    run = [*torchrun, "--max-restarts", str(restarts)]
    whole = [*RUN, *words_of(TINY, data, tmp_path / "whole", **common)]
    subprocess.run(whole, check=True, capture_output=True)
    killed = [*run, *words_of(TINY, data, tmp_path / "killed", **common)]
    process = subprocess.Popen(killed, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "checkpoint-60").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(max(children(process.pid)), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert " of 2 has lost the others: one has ended, or has not answered for 60 seconds" in errors
    assert process.returncode == (0 if restarts else 1)
    if not restarts:
        subprocess.run(killed, check=True, capture_output=True)
    first, second = adapter(tmp_path / "whole"), adapter(tmp_path / "killed")
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


@pytest.mark.slow
def test_ctrl_c(tmp_path, data):
    """The step under way is ended, a checkpoint written; the run goes on from there."""
    common = {"max_steps": 400, "per_device_train_batch_size": 2, "resume": "auto"}
    words = [*RUN, *words_of(TINY, data, tmp_path / "out", **common)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, start_new_session=True, **pipes)
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=120)
    (done,) = re.findall("lowrank: interrupted after (.*) of 400 steps; --resume auto", errors)
    assert (tmp_path / "out" / f"checkpoint-{done}" / "MANIFEST.json").exists()
    last = words_of(TINY, data, tmp_path / "out", **{**common, "max_steps": int(done) + 1})
    again = subprocess.run([*RUN, *last], check=True, capture_output=True, text=True)
    assert f"{done} of {int(done) + 1} steps are done" in again.stderr


def test_a_file_that_one_rank_lacks(tmp_path, data):
    """Each has a current directory of its own; the first names the rank and the file."""
    (tmp_path / "other").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    place |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    words = words_of(TINY.resolve(), Path("data.jsonl"), tmp_path / "out", max_steps=2)
    processes = [
        subprocess.Popen(
            [sys.executable, *words], cwd=at, env={**os.environ, **place, "RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank, at in enumerate((tmp_path, tmp_path / "other"))
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert said == ["lowrank: error: rank 1: data.jsonl: no such file\n", ""]
    assert [process.returncode for process in processes] == [2, 2]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        ([*TRAIN, "--learnin-rate", "3"], "unrecognized arguments: --learnin-rate 3; did you mean"),
        ([*TRAIN, "--config", "no.toml"], "no.toml: No such file"),
        (["-m", "lowrank", "eval", "--model", "m", "--data", "d"], "eval runs in one process; tor"),
    ],
)
def test_a_mistake_is_said_once(words, said):
    """The same words are given to all; torchrun's own report follows, with the first's status."""
    found = subprocess.run([*RUN, *words], capture_output=True, text=True)
    lines = [line for line in found.stderr.splitlines() if line.startswith("lowrank:")]
    assert len(lines) == 1 and said in lines[0]
    assert "exitcode  : 2 " in found.stderr and found.returncode == 1


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
