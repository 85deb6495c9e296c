"""Two processes against one: losses, gradients, weights, decisions, and what goes between them."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import lowrank
from lowrank.cli import main
from lowrank.cli.demo import TINY
from lowrank.data import epoch_order
from lowrank.errors import ConfigError
from lowrank.io.safetensors import load_safetensors
from lowrank.train import TrainConfig, Trainer, sweep

from . import ranks
from .support import Small, example_loss, metrics_lines

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def run(folder, seed: int, *names: str, module: str = "tests.train.ranks") -> None:
    """Run these cases of a module in two processes."""
    words = [sys.executable, "-m", module, str(folder), str(seed)]
    processes = [
        subprocess.Popen([*words, str(rank), "2", *names], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()  # does nothing to one that has ended
            process.wait()


def outcome(folder, rank: int) -> SimpleNamespace:
    """What a rank told of a case."""
    found = json.loads((folder / f"{rank}.json").read_text())
    return SimpleNamespace(**found, trained=load_safetensors(folder / f"{rank}.safetensors"))


@pytest.fixture(scope="module")
def seed_of_all() -> int:
    return int(os.environ.get("LOWRANK_TEST_SEED", 0)) or random.SystemRandom().randrange(1, 2**31)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, seed_of_all):
    """Every case by two processes, and `alone` what one of them does the same way."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "half").mkdir()
    ranks.half(ranks.Case(folder / "half", seed_of_all))
    run(folder, seed_of_all, *(case.__name__ for case in ranks.CASES))
    return folder


@pytest.fixture
def two(folder, request):
    """Both ranks' outcomes of the case that the test is named after."""
    name = request.node.name.removeprefix("test_")
    return [outcome(folder / name, rank) for rank in range(2)]


@pytest.fixture
def one(seed_of_all, request, tmp_path):
    """The same case in one process."""
    case = getattr(ranks, request.node.name.removeprefix("test_"))
    return SimpleNamespace(**case(ranks.Case(tmp_path, seed_of_all)))


def assert_same(two, one) -> None:
    """Equal to one process, and between the ranks to the last bit."""
    for found in two:
        torch.testing.assert_close(found.losses, one.losses, **CLOSE)
        torch.testing.assert_close(found.trained, one.trained, **CLOSE)
        torch.testing.assert_close(found.eval_losses, [list(e) for e in one.eval_losses], **CLOSE)
    assert two[0].losses == two[1].losses
    assert two[0].eval_losses == two[1].eval_losses
    assert all(torch.equal(two[1].trained[name], p) for name, p in two[0].trained.items())


def test_equal(two, one, folder, tmp_path):
    assert_same(two, one)
    assert len(one.losses) == ranks.STEPS and len(one.eval_losses) == 5
    lines = [metrics_lines(at / "run") for at in (folder / "equal", tmp_path)]
    timed = ("seconds", "peak_memory_bytes")
    for line, expected in zip(*lines, strict=True):
        for values in (line, expected):
            for name in timed:
                values.pop(name, None)
        assert line == pytest.approx(expected, rel=1e-5)
    files = []  # the first rank alone writes and talks
    for place in (folder / "equal", tmp_path):
        files.append(sorted(path.name for path in (place / "run").iterdir()))
    assert files[0] == files[1]
    assert two[0].heard and not two[1].heard


def test_what_is_sent(folder, seed_of_all):
    """What is trained, once; its gradients, once a step; nothing of what is frozen."""
    found = outcome(folder / "equal", 0)
    model = ranks.adapted(seed_of_all)
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.nbytes for p in trained)
    assert found.sent["broadcast_"] == size
    # with each tensor a number that says whether there is one; a few sums of one or two numbers
    few = 64 * (ranks.STEPS + 5)
    gradients = ranks.STEPS * (size + 4 * len(trained))
    assert gradients <= found.sent["allreduce_"] <= gradients + few
    assert found.sent.keys() <= {"broadcast_", "allreduce_", "allgather_", "barrier"}
    assert found.sent["allgather_"] < 40_000  # settings, at the start


def test_gradient(two, one, seed_of_all):
    """Against one that is written out in plain torch."""
    assert_same(two, one)
    torch.manual_seed(seed_of_all)
    model = Small()
    before = ranks.trained(model)
    rows = ranks.rows(seed_of_all)
    parts = [example_loss(model, rows[i]) for i in epoch_order(17, 42, 0)[:8]]
    (sum(loss for loss, _ in parts) / sum(count for _, count in parts)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - two[1].trained[name], p.grad, **CLOSE)


def test_frozen_a(two, one):
    assert any("lora_A" in name for name in one.trained)
    assert_same(two, one)


def test_best(two, one):
    """Stopped at step 6 or so by the first rank's metric; what is kept is of its best step."""
    assert_same(two, one)
    assert len(one.losses) < ranks.STEPS


def test_terminated(two, folder):
    assert [found.interrupted for found in two] == [True, True]
    assert [len(found.losses) for found in two] == [3, 3]
    assert (folder / "terminated" / "run" / "checkpoint-3" / "MANIFEST.json").is_file()


def test_stopped(two):
    assert [len(found.losses) for found in two] == [3, 3]
    assert not two[0].interrupted


def test_resumed(two):
    """To the last bit, with dropout of each rank's own."""
    for found in two:
        whole, again = found.losses
        assert whole == again
        for name, p in found.trained.items():
            assert torch.equal(found.trained[name.replace("again", "whole")], p)


def test_other_half(two, folder, seed_of_all, tmp_path):
    """Begun by one and ended by two, and the reverse, against twelve steps of one."""
    config = ranks.Case(tmp_path, seed_of_all).settings(max_steps=12, **ranks.CONSTANT)
    whole = ranks.train(ranks.adapted(seed_of_all), config, ranks.rows(seed_of_all))
    assert_same(two, SimpleNamespace(**whole))
    reverse = ranks.other_half(ranks.Case(folder / "alone", seed_of_all))
    torch.testing.assert_close(reverse["losses"], whole["losses"], **CLOSE)
    torch.testing.assert_close(reverse["trained"], whole["trained"], **CLOSE)


def test_not_finite(two, one):
    """Named by its place on the rank that has it, and on the other."""
    assert "TrainingError: step 2: the loss is nan in the batch of " in one.said
    assert two[0].said == two[1].said
    assert two[0].said.startswith("TrainingError: step 2: the loss is nan in the batch of ")


def test_short_of_memory(two, one):
    assert_same(two, one)
    assert two[1].calls > two[0].calls


def test_refused(two):
    assert two[0].said[:-1] == two[1].said[:-1]
    found = [
        "learning_rate is 0.002 on rank 1 and 0.001 on rank 0; warmup_ratio is 0.1 on rank 1",
        "rank 1 has other training data than rank 0",
        "rank 1 has other frozen weights than rank 0",
        "each needs a row of it; got 1",
        "DataError: rank 1: the data: expected at least one example",
    ]
    for text, said in zip(found, two[0].said, strict=True):
        assert text in said
    assert two[0].wrote == []


def test_left(two):
    assert two[1].said == "ValueError: mine alone"
    assert two[0].said.startswith("TrainingError: rank 0 of 2 has lost the others")
    assert two[0].seconds < 30


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.__name__ for case in ranks.REAL])
def test_real(name, tmp_path, monkeypatch, data_dir, seed, request):
    """Twenty steps of a real model on real text, and a few of a larger one."""
    monkeypatch.setenv("LOWRANK_TEST_DATA", str(data_dir))
    if name == "smollm2":
        monkeypatch.setenv("LOWRANK_SMOLLM2", str(request.getfixturevalue("smollm2")))
    run(tmp_path, seed, name)
    one = SimpleNamespace(**getattr(ranks, name)(ranks.Case(tmp_path / "alone", seed)))
    assert_same([outcome(tmp_path / name, rank) for rank in range(2)], one)
    for _, after in one.eval_losses[1:]:
        assert after < one.eval_losses[0][1]


def test_a_port_that_is_taken(tmp_path, monkeypatch, capsys):
    (tmp_path / "data.jsonl").write_text('{"text": "A number."}\n' * 4)
    words = ["--model", str(TINY), "--data", str(tmp_path / "data.jsonl")]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        there = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in there.items():
            monkeypatch.setenv(name, str(value))
        assert main(["train", *words, "--output-dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    expected = f"the 2 processes cannot meet at 127.0.0.1:{port}: another program has that port"
    assert expected in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_a_process_group(tmp_path, monkeypatch):
    """What was asked for, or started by torchrun, is not done by one process without a word."""
    rows = [{"input_ids": [5, 6, 7]}] * 4
    with pytest.raises(ConfigError, match="parallel is 'ddp', but torch.distributed is not init"):
        Trainer(Small(), TrainConfig(tmp_path, parallel="ddp"), rows)
    with pytest.raises(ConfigError, match="parallel must be None or one of ddp, fsdp; got 'fast'"):
        TrainConfig(tmp_path, parallel="fast")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="not initialised: start with torchrun"):
        Trainer(Small(), TrainConfig(tmp_path), rows)
    with pytest.raises(ConfigError, match="a sweep trains in one process; got 2"):
        sweep(Small(), lowrank.LoRAConfig(), TrainConfig(tmp_path), rows, rows)
