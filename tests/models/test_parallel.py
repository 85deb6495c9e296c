"""Layers and a decoder shared by two processes, against the same in one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest
import torch

from lowrank.io.safetensors import load_safetensors

from . import parallel_ranks as ranks

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{case: (the first rank's tensors, each rank's numbers)} of two processes."""
    return run(tmp_path_factory.mktemp("parallel"), 2, ranks.CASES)


def run(folder, count: int, cases) -> dict:
    seed = int(os.environ.get("LOWRANK_TEST_SEED", 0)) or random.SystemRandom().randrange(1, 2**31)
    words = [sys.executable, "-W", "error", "-m", "tests.models.parallel_ranks", str(folder)]
    processes = [
        subprocess.Popen(
            [*words, str(seed), str(rank), str(count), *cases], stderr=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0] * count, f"LOWRANK_TEST_SEED={seed}: {' '.join(errors)}"

    def read(case: str) -> tuple[dict, list]:
        paths = [folder / f"{case}.{rank}.json" for rank in range(count)]
        numbers = [json.loads(path.read_text()) for path in paths]
        tensors = [folder / f"{case}.{rank}.safetensors" for rank in range(count)]
        if not tensors[0].exists():
            return {}, numbers
        first, *others = [load_safetensors(path) for path in tensors]
        for other in others:  # whole on each rank
            cut = [
                {k: t for k, t in one.items() if "two" in k.split("/")} for one in (first, other)
            ]
            torch.testing.assert_close(cut[0], cut[1], rtol=0, atol=0)
        return first, numbers

    return {case: read(case) for case in cases}


@pytest.mark.parametrize("style", ranks.STYLES)
@pytest.mark.parametrize("kind", ranks.LAYERS)
def test_a_layer_is_that_of_one_process(found, kind, style):
    tensors, numbers = found["layers"]
    at = f"{kind}/{style}"
    compared = [name for name in tensors if name.startswith(f"{at}/one/")]
    assert len(compared) >= (5 if "adapter" in kind and "no" not in kind else 3)
    for name in compared:
        expected = tensors[name]
        scale = expected.abs().max().item()
        close = {"rtol": 1e-5, "atol": 1e-6 * max(1.0, scale)}
        torch.testing.assert_close(tensors[name.replace("/one/", "/two/")], expected, **close)


@pytest.mark.parametrize("kind", ranks.LAYERS)
def test_a_rank_holds_its_part(found, kind):
    """Half, and what belongs to all rows or all columns."""
    _, numbers = found["layers"]
    _, adapter, N, K = ranks.LAYERS[kind]
    r = 3 if adapter else 0
    for of_rank in numbers:
        rows, rows_held = of_rank[f"{kind}/colwise"]
        assert rows_held <= rows / 2 + 4 * r * K + 64 + K * 4  # A, the table, and the odd row
        columns, columns_held = of_rank[f"{kind}/rowwise"]
        assert columns_held <= columns / 2 + 4 * r * N + 64 + 12 * N  # B, table, steps and bias


def test_training_is_that_of_one_process(found):
    """20 steps on the model that is shipped: losses, norms, adapters."""
    tensors, numbers = found["stories"]
    assert len(numbers[0]["one"]["losses"]) == ranks.STEPS
    assert min(numbers[0]["one"]["norms"]) > 0.5  # clipped
    assert_one(tensors, numbers)
    assert len([name for name in tensors if name.startswith("one/")]) == 1 + 2 * 7 * 4


def assert_one(tensors, numbers) -> None:
    """The same was trained by one process and by all of them."""
    for of_rank in numbers:
        one, two = of_rank["one"], of_rank["two"]
        torch.testing.assert_close(two["losses"], one["losses"], **CLOSE)
        torch.testing.assert_close(two["norms"], one["norms"], **CLOSE)
        assert of_rank["two"] == numbers[0]["two"]
    for name in tensors:
        if name.startswith("one/"):
            of_all = tensors[name.replace("one/", "two/", 1)]
            torch.testing.assert_close(of_all, tensors[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("stories260k", 2), ("smollm2", 3)])
def test_a_real_model(name, count, tmp_path, monkeypatch, data_dir, smollm2):
    """20 steps, and a few of a larger one, whose nine heads three share."""
    monkeypatch.setenv("LOWRANK_TEST_DATA", str(data_dir))
    monkeypatch.setenv("LOWRANK_SMOLLM2", str(smollm2))
    tensors, numbers = run(tmp_path, count, [name])[name]
    assert len(numbers[0]["one"]["losses"]) == (ranks.STEPS if name == "stories260k" else 3)
    assert_one(tensors, numbers)


def test_what_is_held_and_sent(found):
    for of_rank in found["stories"][1]:
        whole, held = of_rank["bytes"]
        assert held < 0.65 * whole  # the adapters' whole halves, r / 64 of so small a model
        calls, adapters, largest, largest_adapter = of_rank["at the start"]
        assert calls == adapters and largest <= largest_adapter  # nothing that is frozen
        # of four blocks two sums each; but where o_proj is cut by rows, x is gathered, and y
        assert of_rank["forward"] == 4 + 2 + 2 * 2


def test_generating_is_refused(found):
    for of_rank in found["stories"][1]:
        assert "generate with one that is not cut" in of_rank["generating"]


def test_checkpointing_changes_nothing(found):
    for of_rank in found["stories"][1]:
        plain, whole, selective = of_rank["checkpointing"]
        torch.testing.assert_close(whole, plain, **CLOSE)
        torch.testing.assert_close(selective, plain, **CLOSE)


def test_what_cannot_be_cut_is_refused(found):
    expected = {
        "block": r"W [N=8, K=96] in blocks of 64 cannot be cut into 2 parts",
        "columns": r"W [N=8, K=7] in blocks of 1 cannot be cut into 2 parts",
        "rows": "a row of W [N=1, K=64] for each of 2 ranks",
        "scheme": "got int8",
        "dora": "'default' is of DoRA",
        "target_rows": "'default' has target_rows",
        "merged": "neither merged",
        "heads": "expected heads, 3 and 3 of keys and values",
        "fused": "queries, keys and values in one layer",
        "experts": "mixtures of experts are not cut",
        **dict.fromkeys(("cut", "placed", "unread"), "expected a model that lies whole"),
    }
    for numbers in found["refused"][1]:
        said = numbers["said"]
        assert said.keys() == expected.keys()
        for name, words in expected.items():
            assert said[name] is not None and words in said[name], name
            assert "\n" not in said[name]
        assert numbers["changed"] == []


@pytest.mark.slow
def test_with_fsdp2_over_another_dimension(tmp_path):
    tensors, numbers = run(tmp_path, 4, ["both_ways"])["both_ways"]
    names = [name for name in tensors if name.startswith("one/")]
    assert len(names) == 4
    for name in names:
        expected = tensors[name]
        scale = expected.abs().max().item()
        close = {"rtol": 1e-5, "atol": 1e-6 * max(1.0, scale)}
        torch.testing.assert_close(tensors[name.replace("one/", "two/")], expected, **close)
    for of_rank in numbers:
        whole, held = of_rank["bytes"]
        assert held < 0.45 * whole  # what is whole in one dimension halves in the other
