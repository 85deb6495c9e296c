"""Two processes that each have a part of the model, against one that has all of it."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import lowrank
from lowrank.cli.demo import TINY
from lowrank.errors import ConfigError
from lowrank.io.safetensors import load_safetensors
from lowrank.train import TrainConfig, Trainer, shard

from . import ranks, sharded_ranks
from .support import Small, metrics_lines
from .test_distributed import CLOSE, assert_same, outcome, run, seed_of_all  # noqa: F401

MODULE = "tests.train.sharded_ranks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, seed_of_all):  # noqa: F811
    """Every case by two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "half").mkdir()
    sharded_ranks.half(ranks.Case(folder / "half", seed_of_all))
    names = [case.__name__ for case in sharded_ranks.CASES]
    run(folder, seed_of_all, *names, "not_finite", "best", module=MODULE)
    return folder


@pytest.fixture
def two(folder, request):
    """Both ranks' outcomes of the case that the test is named after."""
    name = request.node.name.removeprefix("test_")
    return [outcome(folder / name, rank) for rank in range(2)]


@pytest.fixture
def one(seed_of_all, request, tmp_path):  # noqa: F811
    """The same case in one process."""
    name = request.node.name.removeprefix("test_")
    case = getattr(sharded_ranks, name, None) or getattr(ranks, name)
    return SimpleNamespace(**case(ranks.Case(tmp_path, seed_of_all)))


def test_equal(two, one, folder, tmp_path):
    """Losses, norms, weights and files; the first rank alone writes."""
    assert_same(two, one)
    lines = [metrics_lines(at / "run") for at in (folder / "equal", tmp_path)]
    for line, expected in zip(*lines, strict=True):
        for values in (line, expected):
            for name in ("seconds", "peak_memory_bytes"):
                values.pop(name, None)
        assert line == pytest.approx(expected, rel=1e-5)
    files = [
        load_safetensors(at / "run" / "adapter_model.safetensors")
        for at in (folder / "equal", tmp_path)
    ]
    torch.testing.assert_close(*files, **CLOSE)
    names = [sorted(p.name for p in (at / "run").iterdir()) for at in (folder / "equal", tmp_path)]
    assert names[0] == names[1]


def test_what_each_has(folder):
    """Of every tensor half, codes, scales and constants too, but for the rows that are odd."""
    found = [outcome(folder / "equal", rank) for rank in range(2)]
    for name, (here, total, rows) in found[0].sizes.items():
        there, *same = found[1].sizes[name]
        assert same == [total, rows] and total == here + there, name
        assert here == -(-rows // 2) * (total // rows), name
    # what is trained goes out once, before it is cut; of what is frozen nobody sends a whole tensor
    trained = sum(p.nbytes for p in found[0].trained.values())
    assert found[0].sent["broadcast_"] == trained


def test_full(two, one):
    assert_same(two, one)


def test_options(two, one):
    for found in two:
        for name in sharded_ranks.OPTIONS:
            torch.testing.assert_close(found.losses[name], one.losses[name], **CLOSE)
        torch.testing.assert_close(found.trained, one.trained, **CLOSE)


def test_half_precision(folder):
    for rank in range(2):
        found = outcome(folder / "half_precision", rank)
        assert found.same and found.dtype == "torch.bfloat16"
        assert found.grads == ["torch.float32"] and found.error < 0.02


def test_best(two, one):
    assert_same(two, one)


def test_not_finite(two, one):
    expected = "TrainingError: step 2: the loss is nan in the batch of "
    assert two[0].said == two[1].said
    assert two[0].said.startswith(expected) and one.said.startswith(expected)


def test_resumed(two):
    """To the last bit."""
    for found in two:
        assert found.losses[0] == found.losses[1]
        for name, p in found.trained.items():
            assert torch.equal(found.trained[name.replace("again", "whole")], p)


def test_other_half(two, folder, seed_of_all, tmp_path):  # noqa: F811
    """Begun by one and ended by two, and the reverse, against six steps of one."""
    case = ranks.Case(tmp_path, seed_of_all)
    config = case.settings(max_steps=6, **ranks.CONSTANT)
    whole = ranks.train(sharded_ranks.adapted(case), config, ranks.rows(seed_of_all))
    assert_same(two, SimpleNamespace(**whole))
    reverse = sharded_ranks.other_half(ranks.Case(folder / "alone", seed_of_all))
    torch.testing.assert_close(reverse["losses"], whole["losses"], **CLOSE)
    torch.testing.assert_close(reverse["trained"], whole["trained"], **CLOSE)


def test_optimizers(two):
    for found in two:
        assert all(all(same) for same in found.same.values()), found.same


def test_loaded(two, folder, seed_of_all, tmp_path):  # noqa: F811
    """By rows of each rank's own: equal to the bit, nothing sent, and never a whole matrix here."""
    table = lowrank.load_model(TINY).body.embedding.weight.nbytes  # the largest
    for found in two:
        for (scheme, _), (same, largest, sent) in zip(
            sharded_ranks.LOADED, found.found, strict=True
        ):
            assert same and not sent, scheme
            if scheme in ("nf4", "int8", None):
                assert largest <= table / 2, scheme
    torch.manual_seed(seed_of_all)
    model = lowrank.load_model(TINY, quantizer="nf4")
    lowrank.inject(model, lowrank.LoRAConfig(r=3, target_modules="all-linear"))
    config = ranks.Case(tmp_path, seed_of_all).settings(max_steps=2)
    one = ranks.train(model, config, ranks.rows(seed_of_all))
    assert_same(two, SimpleNamespace(**one))
    # what a run must agree in does not tell how many had the weights
    checkpoint = folder / "loaded" / "run" / "checkpoint-2"
    config = ranks.Case(tmp_path, seed_of_all).settings("more", max_steps=3, resume=checkpoint)
    assert len(Trainer(model, config, ranks.rows(seed_of_all)).train().losses) == 3


def test_refused(two):
    expected = [
        "r of adapter 'default' is 3 on rank 1 and 2 on rank 0; .*",
        r"\.packed is None on rank 1 and '.* uint8' on rank 0; .*; and \d+ more: start all of them",
        "parallel is 'ddp' on rank 1 and 'fsdp' on rank 0: start all of them with the same sett",
        "seed is 3 on rank 1 and .* on rank 0: start all of them with the same sett",
    ]
    for found in two:
        assert not found.wrote and len(found.said) == len(expected)
        for line, wanted in zip(found.said, expected, strict=True):
            assert line.startswith("ConfigError: the 2 processes are not of one run: ")
            assert re.search(wanted, line), line


@pytest.mark.slow
def test_compiled(tmp_path, seed):
    run(tmp_path, seed, "compiled", module=MODULE)
    one = SimpleNamespace(**sharded_ranks.compiled(ranks.Case(tmp_path / "alone", seed)))
    assert_same([outcome(tmp_path / "compiled", rank) for rank in range(2)], one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories", "smollm2"])
def test_real(name, tmp_path, monkeypatch, data_dir, smollm2, seed):
    """Twenty steps of a real model on real text, and a few of a larger one."""
    monkeypatch.setenv("LOWRANK_TEST_DATA", str(data_dir))
    monkeypatch.setenv("LOWRANK_SMOLLM2", str(smollm2))
    run(tmp_path, seed, name, module=MODULE)
    one = SimpleNamespace(**getattr(ranks, name)(ranks.Case(tmp_path / "alone", seed)))
    assert_same([outcome(tmp_path / name, rank) for rank in range(2)], one)


def test_what_cannot_be(tmp_path):
    rows = [{"input_ids": [5, 6, 7]}] * 4
    with pytest.raises(ConfigError, match="parallel is 'fsdp', but torch.distributed is not init"):
        Trainer(Small(), TrainConfig(tmp_path, parallel="fsdp"), rows)
    with pytest.raises(ConfigError, match="shard: expected torch.distributed to be initialised"):
        shard(Small())
    with pytest.raises(ConfigError, match="cpu_offload is for parallel='fsdp'; got None"):
        TrainConfig(tmp_path, cpu_offload=True)
    for name in ("fp16", "auto_find_batch_size"):
        with pytest.raises(ConfigError, match=f"{name} cannot be on where parallel is 'fsdp'"):
            TrainConfig(tmp_path, parallel="fsdp", **{name: True})
