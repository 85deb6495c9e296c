"""QLoRA steps of a real model beside transformers + peft + bitsandbytes, on the same tokens.

SmolLM2-135M, NF4 with double quantization, LoRA r=16 on every linear, float32, AdamW, batches of
four E2E pairs of up to 128 tokens, no dropout, the adapters begun alike. "packed" has as many pairs
in a batch as fit into its positions, so other ones, and more.
Every side is a process; step i is done by each in turn before step i + 1. Peak memory is that of
the steps above the process with `import torch` done; the peak while loading is beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import peers
from benchmarks.errors import MissingInputError
from benchmarks.harness import spread
from benchmarks.settings import Settings
from benchmarks.training_data import labelled_tokens, padding_share, real_tokens
from benchmarks.training_worker import FULL

ROOT = Path(__file__).parent.parent
PEER, TRL = "peft + bitsandbytes", "trl"
WARM_UP = 2  # steps left out of the times: the first allocate and initialise
OURS = (
    "lowrank",
    "lowrank, packed",
    "lowrank, padding computed",
    "lowrank, padding and all logits",
    "lowrank, checkpointing",
    "lowrank, selective",
)
LOSS_LIMIT = 1e-2  # relative, from the peer at any step


def run(settings: Settings) -> list[dict]:
    """One case, every side. Raises MissingInputError."""
    gguf, pairs = inputs()
    sides = [*OURS]
    if {"peft", "bitsandbytes"} <= set(settings.against):
        sides += [PEER, f"{PEER}, checkpointing"]
    if {"peft", "bitsandbytes", "trl"} <= set(settings.against):
        sides.append(TRL)
    if {"peft", "torch"} <= set(settings.against):
        sides.append("peft, dense fp32")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        settings.tell("training_step: converting the model")
        convert(gguf, pairs, directory, settings.steps)
        batches = {
            side: json.loads((directory / file).read_text())
            for side in sides
            for file in ["full.json" if side in FULL else "batches.json"]
        }
        config = json.loads((directory / "config.json").read_text())
        workers: list[Worker] = []
        try:
            for side in sides:
                settings.tell(f"training_step: {side} loads")
                workers.append(Worker(side, directory))
            answers = _take_turns(workers, settings)
        finally:
            for worker in workers:
                worker.close()
    head = config["vocab_size"] * config["hidden_size"]
    return _rows(sides, workers, answers, batches, head)


def operations(adapted: int, trainable: int, head: int, tokens: int, labels: int) -> int:
    """What a step must multiply and add: forward and dX of the linears (Σ N·K = `adapted`), forward
    and dX, dA, dB of their adapters, forward and dX of the head where there is a label.

    Attention, norms and the first layer's dX, which nobody needs, are not counted.
    """
    return tokens * (4 * adapted + 6 * trainable) + 4 * head * labels


class Worker:
    """A side in a process; `ask` waits for its answer. What its libraries say is kept in a file."""

    def __init__(
        self, side: str, directory: Path, module: str = "benchmarks.training_worker"
    ) -> None:
        self.side = side
        self._log = directory / f"{side}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, side, str(directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                cwd=ROOT,
            )
        self.loaded = self._answer()  # one after another: loading uses every core

    def ask(self, line: str) -> dict:
        """What the worker answers: of a training step `line`, its seconds, loss and peak memory."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status, said = self._process.wait(), self._log.read_text()[-4000:]
            raise RuntimeError(f"{self.side} ended with status {status}:\n{said}")
        return json.loads(line)


def convert(gguf: str, pairs: str, directory: Path, steps: int) -> None:
    """Write the model and the batches of `training_data` into the directory."""
    module = [sys.executable, "-m", "benchmarks.training_data"]
    done = subprocess.run(
        [*module, gguf, pairs, str(directory), str(steps)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"training_step: the model was not converted:\n{done.stdout[-4000:]}")


def _take_turns(workers: list[Worker], settings: Settings) -> list[list[dict]]:
    answers: list[list[dict]] = [[] for _ in workers]
    for step in range(settings.steps):
        for position in range(len(workers)):
            which = (position + step) % len(workers)
            answers[which].append(workers[which].ask(str(step)))
        settings.tell(
            f"training_step: step {step + 1} of {settings.steps}: "
            + ", ".join(
                f"{worker.side} {done[-1]['seconds']:.2f} s"
                for worker, done in zip(workers, answers, strict=True)
            )
        )
    return answers


def _rows(
    sides: list[str], workers: list[Worker], answers: list[list[dict]], batches: dict, head: int
) -> list[dict]:
    reference = PEER if PEER in sides else sides[0]
    losses = {
        side: [answer["loss"] for answer in done] for side, done in zip(sides, answers, strict=True)
    }
    case = (
        "SmolLM2-135M QLoRA, NF4 + double quantization, r=16, float32, batch 4 x 128 positions, "
        f"of which {100 * padding_share(batches[sides[0]]):.0f} % are padding"
    )
    rows = []
    for side, worker, done in zip(sides, workers, answers, strict=True):
        tokens = [real_tokens(batch) for batch in batches[side]]
        labels = [labelled_tokens(batch) for batch in batches[side]]
        timed = [answer["seconds"] for answer in done[WARM_UP:]]
        rates = [count / took for count, took in zip(tokens[WARM_UP:], timed, strict=True)]
        sizes = (worker.loaded["adapted"], worker.loaded["trainable"], head)
        flops = [operations(*sizes, *counts) for counts in zip(tokens, labels, strict=True)]
        rows.append(
            {
                "benchmark": "training_step",
                "case": case,
                "contender": side,
                "path": "",
                **spread(timed),
                "tokens_per_second": statistics.median(rates),
                "tflops": statistics.median(
                    count / took * 1e-12 for count, took in zip(flops[WARM_UP:], timed, strict=True)
                ),
                "peak_bytes": max(answer["peak_bytes"] for answer in done),
                "load_peak_bytes": max(answer["load_peak_bytes"] for answer in done),
                "losses": losses[side],
                "loss_difference": None
                if side in FULL
                else _difference(losses[side], losses[reference]),
                **{key: worker.loaded[key] for key in ("layers", "trainable")},
            }
        )
        plain = side.split(",")[0]
        if side.endswith(("checkpointing", "selective")):
            # of the same batches, step by step
            whole = [answer["seconds"] for answer in answers[sides.index(plain)][WARM_UP:]]
            shares = (took / of for took, of in zip(timed, whole, strict=True))
            rows[-1]["over_plain"] = statistics.median(shares)
    by_side = {row["contender"]: row for row in rows}
    for row in rows:
        row["baseline"] = reference
        row["speed"] = row["tokens_per_second"] / by_side[reference]["tokens_per_second"]
        if row["trainable"] != by_side[reference]["trainable"]:
            row["wrong"] = f"{row['trainable']} trainable parameters, {reference} has others"
        elif row["contender"] in OURS and not (row["loss_difference"] or 0) <= LOSS_LIMIT:
            row["wrong"] = f"losses differ from {reference} by more than {LOSS_LIMIT:.0e} relative"
    return rows


def _difference(losses: list[float], reference: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def inputs() -> tuple[str, str]:
    """The GGUF file and the E2E pairs. Raises MissingInputError."""
    gguf = os.environ.get("LOWRANK_SMOLLM2", ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    pairs = (
        Path(os.environ.get("LOWRANK_TEST_DATA", ROOT.parent / "shared" / "data"))
        / "e2e_train.jsonl.gz"
    )
    if not Path(gguf).is_file():
        raise MissingInputError(
            "LOWRANK_SMOLLM2 must be the path of SmolLM2-135M-Instruct.Q4_1.gguf, which "
            "`make smollm2` gets"
        )
    if not pairs.is_file():
        raise MissingInputError(
            f"{pairs} is missing; LOWRANK_TEST_DATA must be the folder with the E2E pairs"
        )
    for package in ("transformers", "gguf"):
        if peers.missing(package) is not None:
            raise MissingInputError(
                f"{peers.missing(package)}; it converts the model for every side"
            )
    return str(Path(gguf).resolve()), str(pairs.resolve())
