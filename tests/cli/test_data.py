"""`lowrank train` on tables, packed; what is wrong in them is one line and status 2."""

from __future__ import annotations

import csv
import json

import pytest


@pytest.fixture
def train(run, tiny, tmp_path):
    def call(data, *words):
        return run(
            "train", "--model", tiny, "--data", data, "--output-dir", tmp_path / "out",
            "--max-steps", 2, "--r", 4, *words,
        )  # fmt: skip

    return call


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "sums.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "instruction", "input", "output", "text"])
        writer.writerows([n, "Add.", f"{n} and {n}", 2 * n, f"{n} {n} {2 * n}"] for n in range(40))
    return path


def test_a_table_packed(train, table, tmp_path):
    outcome = train(
        table, "--packing", "--max-length", 96, "--dataset-text-field", "text",
        "--per-device-train-batch-size", 2, "--token-cache", tmp_path / "cache",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert all(96 < line["tokens"] <= 192 for line in steps if "tokens" in line)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    again = train(table, "--config", tmp_path / "out" / "run.toml", "--overwrite-output-dir")
    assert again.status == 0 and len(list((tmp_path / "cache").iterdir())) == 1


def test_what_is_wrong_is_one_line(train, table, tmp_path):
    for words, expected in {
        (): "sums.csv:2: has fields of 2 kinds of example, 'text' and 'instruction'",
        ("--dataset-text-field", "body"): "sums.csv:2: lacks the field 'body'",
        ("--dataset-text-field", "text", "--packing", "--group-by-length"): "turn one off",
    }.items():
        outcome = train(table, *words)
        assert (outcome.status, outcome.err.count("\n")) == (2, 1) and expected in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["sums.csv"]
