"""`lowrank sweep` on the tiny model."""

from __future__ import annotations

import json

import pytest

from .conftest import write_pairs


@pytest.fixture
def held_out(tmp_path):
    return write_pairs(tmp_path / "held_out.jsonl", 6)


def test_a_sweep_prints_its_table_and_leaves_its_files(run, tiny, data, held_out, tmp_path):
    words = (
        "sweep", "--model", tiny, "--data", data, "--eval-data", held_out, "--quantizer", "nf4",
        "--output-dir", tmp_path / "out", "--ranks", 2, 4, "--grid", "learning-rate=5e-3,1e-2",
        "--target-modules", "q_proj", "down_proj", "--lora-alpha", 16, "--max-steps", 3,
        "--longer", 1, "--per-device-train-batch-size", 2,
    )  # fmt: skip
    outcome = run(*words)
    assert outcome.status == 0, outcome.err
    assert "| stage " in outcome.out and "Elbow: r" in outcome.out
    assert f"saved in {tmp_path / 'out'}" in outcome.out
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["grid"] == {"r": [2, 4], "learning_rate": [5e-3, 1e-2]}
    scanned = [t["settings"] for t in found["trials"] if t["stage"] == "scan"]
    assert scanned == [{"r": r, "learning_rate": lr} for r in (2, 4) for lr in (5e-3, 1e-2)]
    assert any(t["stage"] == "refine" for t in found["trials"])
    best = tmp_path / "out" / found["best"]
    config = json.loads((best / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 2 * config["r"]
    said = run(
        "generate", "--model", tiny, "--adapter", best, "--prompt", "a", "--max-new-tokens", 2
    )
    assert said.status == 0
    again = run(*words)
    assert again.status == 2 and "already holds a sweep (sweep.json)" in again.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a sweep compares held-out losses: pass --eval-data"),
        (["--eval-data", "EVAL", "--grid", "learning_rate"], "grid: expected FIELD=VALUE,VALUE"),
        (["--eval-data", "EVAL", "--grid", "r=8,"], "grid: expected FIELD=VALUE,VALUE; got 'r=8,'"),
        (["--eval-data", "EVAL", "--grid", "rate=8"], "LoRAConfig and TrainConfig; got 'rate'"),
        (["--eval-data", "EVAL", "--longer", "0.5"], "longer: expected a number of at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_line(run, tiny, data, held_out, tmp_path, words, message):
    words = [held_out if word == "EVAL" else word for word in words]
    outcome = run(
        "sweep", "--model", tiny, "--data", data, "--output-dir", tmp_path / "out", *words
    )
    assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_field_of_the_grid_twice(run, tiny, data, tmp_path):
    outcome = run(
        "sweep", "--model", tiny, "--data", data, "--eval-data", data, "--output-dir",
        tmp_path / "s", "--grid", "seed=1,2", "seed=3",
    )  # fmt: skip
    assert outcome.status == 2 and "grid: expected seed once; got 'seed=3' too" in outcome.err
    assert not (tmp_path / "s").exists()
