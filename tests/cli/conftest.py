"""The command line in this process, and what the tests give it."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from lowrank.cli import main
from lowrank.cli.demo import TINY


@dataclass
class Outcome:
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys):
    """run(*words) -> Outcome of `lowrank *words`."""

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            status = stop.code or 0
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The tiny Llama that comes with lowrank, a Hugging Face directory."""
    return TINY


def write_pairs(path: Path, count: int) -> Path:
    """Sums to learn, as prompt and completion."""
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            a, b = random.randrange(10), random.randrange(10)
            pair = {"prompt": f"What is {a} plus {b}?\n", "completion": f"It is {a + b}."}
            file.write(json.dumps(pair) + "\n")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "train.jsonl", 24)
