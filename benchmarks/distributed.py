"""A QLoRA step shared by two processes: what travels between them, what each of them holds.

A decoder of random weights in 4 bits with adapters beside all linear layers, its table and head
dense; every way to share it, and FSDP2 over the layers of other packages, trains the same examples
on gloo. Bytes are exact, and those of a larger model in proportion. Seconds are of two processes on
the cores of one machine: they say what the parts cost, and nothing about a network or GPUs.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import lowrank
from benchmarks.distributed_worker import LENGTH, RANK, ROWS, SIDES, SIZES, VOCABULARY
from benchmarks.harness import spread
from benchmarks.memory import random_model
from benchmarks.settings import Settings

ROOT = Path(__file__).parent.parent
RANKS = 2
WARM_UP = 1
HELD = ("packed weights", "scales", "dense weights", "embeddings", "adapters", "optimizer")
PLANNED = {"lowrank, one process": 1, "lowrank, FSDP2": RANKS}  # how many devices share
CLOSE = 1e-5


def run(settings: Settings) -> list[dict]:
    """One case: a row a side, of those that are here."""
    hidden, layers = SIZES
    case = f"{layers} layers of {hidden}, {ROWS} x {LENGTH} tokens a step, {RANKS} processes"
    answers = {}
    for side in SIDES:
        package = side.split(",")[0]
        if package == "lowrank" or package in settings.against:
            answers[side] = train(side, max(settings.steps, WARM_UP + 2))
            settings.tell(f"distributed: {side}: {answers[side]['seconds'][-1]:.1f} s a step")
    rows = rows_of(case, answers)
    for row in rows:
        if row["contender"] in PLANNED:
            row["planned_bytes"] = planned(PLANNED[row["contender"]])
    return rows


def planned(devices: int) -> int:
    """Bytes that `lowrank.plan_memory` has each of so many devices hold between steps."""
    lora = lowrank.LoRAConfig(r=RANK, target_modules="all-linear")
    config = random_model(*SIZES, VOCABULARY, tied=False)
    plan = lowrank.plan_memory(
        config, lora, quantizer="nf4", max_length=LENGTH, device="cpu", devices=devices
    )
    return sum(plan.components[name] for name in HELD)


def train(side: str, steps: int) -> dict:
    """What the ranks of a side say: the first one's, with the most that any of them holds."""
    ranks = 1 if side.endswith("one process") else RANKS
    words = [sys.executable, "-m", "benchmarks.distributed_worker", side]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [*words, str(rank), str(ranks), folder, str(steps)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        said = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"distributed: {side} ended with {process.returncode}: {errors}")
    answers = [json.loads(out.splitlines()[-1]) for out, _ in said]
    most = {name: max(answer["held"][name] for answer in answers) for name in answers[0]["held"]}
    return {**answers[0], "held": most}


def rows_of(case: str, answers: dict[str, dict]) -> list[dict]:
    """A row a side. Ours is wrong where a loss is not that of one process."""
    first = next(iter(answers))
    baseline = answers[first]
    rows = []
    for side, answer in answers.items():
        taken, held = answer["seconds"][WARM_UP:], answer["held"]
        row = {
            "benchmark": "distributed",
            "case": case,
            "contender": side,
            **spread(taken),
            "baseline": first,
            "sent_bytes": answer["sent"],
            "block_bytes": held["blocks"],
            "rest_bytes": held["rest"],
            "adapter_bytes": held["adapters"],
            "state_bytes": answer["state"],
            "held_bytes": sum(held.values()) + answer["state"],
            "block_share": held["blocks"] / baseline["held"]["blocks"],
            "last_loss": answer["losses"][-1],
        }
        pairs = zip(answer["losses"], baseline["losses"], strict=True)
        if side.startswith("lowrank") and not all(
            math.isclose(loss, expected, rel_tol=CLOSE) for loss, expected in pairs
        ):
            row["wrong"] = f"losses {answer['losses']}, of one process {baseline['losses']}"
        rows.append(row)
    return rows
