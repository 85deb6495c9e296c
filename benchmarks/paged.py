"""A step of paged optimizers beside their resident twins: with a tenth of the state in memory.

Parameters are float32, on the CPU: whole weights, and the adapters of a model's linears. Every side
is a process with the same parameters and gradients; steps are taken in turn. Memory is the peak of
the process above what it had with parameters and gradients made, and the code of a step loaded. A
page file that fits the page cache stays there, as long as nobody wants its memory: what is measured
is what paging costs beside a disk, which would have to write and read the state at every step.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.errors import MissingInputError
from benchmarks.harness import spread
from benchmarks.settings import Settings

ROOT = Path(__file__).parent.parent
RULES = {"AdamW8bit": 2.03, "AdamW": 8.0}  # bytes of state a parameter
TENTH = 10  # the budget is that part of the state
RANK, LINEARS = 64, 224  # seven in each of 32 blocks
WEIGHTS = 8
WARM_UP = 2  # steps left out of the times: the first make the state
PEERS_NOTE = (
    "paged: bitsandbytes' paged optimizers are ordinary ones on a CPU, torchao's "
    "CPUOffloadOptimizer is for GPUs: neither is beside ours"
)


def run(settings: Settings) -> list[dict]:
    """Two cases a shape and an optimizer. Raises MissingInputError where the disk has no room."""
    rows = []
    for label, N, K in settings.shapes:
        adapters = [(RANK, K), (N, RANK)] * LINEARS
        cases = {f"{WEIGHTS} {label}": [(N, K)] * WEIGHTS}
        cases[f"LoRA r={RANK} of {LINEARS} {label}"] = adapters
        for case, sizes in cases.items():
            for rule in RULES:
                rows += compare(f"{case}, {rule}", rule, sizes, settings)
    settings.note(PEERS_NOTE)
    return rows


def compare(case: str, rule: str, sizes: list[tuple[int, int]], settings: Settings) -> list[dict]:
    elements = sum(N * K for N, K in sizes)
    state = int(elements * RULES[rule])
    with tempfile.TemporaryDirectory() as directory:
        if shutil.disk_usage(directory).free < 2 * state:
            raise MissingInputError(f"{directory}: no room for {state / 1e9:.1f} GB; set TMPDIR")
        sides: list[Side] = []
        try:
            for budget in (None, state // TENTH):
                sides.append(Side(rule, sizes, budget, directory))
            answers: list[list[dict]] = [[] for _ in sides]
            for step in range(settings.steps):
                for side, done in zip(sides, answers, strict=True):
                    done.append(side.step())
                settings.tell(
                    f"paged: {case}: step {step + 1} of {settings.steps}: "
                    + ", ".join(f"{done[-1]['seconds'] * 1e3:.0f} ms" for done in answers)
                )
            ends = [side.close() for side in sides]
        finally:
            for side in sides:
                side.kill()
    return paged_rows(case, rule, state, answers, ends)


def paged_rows(
    case: str, rule: str, state: int, answers: list[list[dict]], ends: list[dict]
) -> list[dict]:
    """A row a side: the resident one, then the paged.

    The paged is wrong where its parameters are others, or its memory has grown by more than the
    budget and two chunks.
    """
    budget = state // TENTH
    names = (f"lowrank {rule}", f"lowrank Paged{rule}, {budget / 1e6:.1f} MB")
    times = [[answer["seconds"] for answer in done[WARM_UP:]] for done in answers]
    resident = statistics.median(times[0])
    rows = []
    for name, taken, done in zip(names, times, answers, strict=True):
        median = statistics.median(taken)
        row = {
            "benchmark": "paged",
            "case": f"{case}: {state / 1e6:.0f} MB of state",
            "contender": name,
            "path": "",
            **spread(taken),
            "baseline": names[0],
            "speed": resident / median,
            "held_bytes": state,
            "extra_bytes": max(answer["grown_bytes"] for answer in done),
        }
        rows.append(row)
    rows[1]["over_bare"] = statistics.median(times[1]) / resident
    limit = budget + 2 * ends[1]["chunk_bytes"]
    if ends[0]["digest"] != ends[1]["digest"]:
        rows[1]["wrong"] = "the parameters are not those of the resident optimizer, to the bit"
    elif rows[1]["extra_bytes"] > limit:
        rows[1]["wrong"] = (
            f"memory grew by {rows[1]['extra_bytes'] / 1e6:.1f} MB, expected at most the budget "
            f"and two chunks, {limit / 1e6:.1f} MB"
        )
    return rows


class Side:
    """An optimizer in a process of its own that steps when it is told to."""

    def __init__(
        self, rule: str, sizes: list[tuple[int, int]], budget: int | None, directory: str
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.paged_worker", rule, str(budget or 0), directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=ROOT,
        )
        self._ask(json.dumps(sizes))  # one after another: making gradients uses every core

    def step(self) -> dict:
        """Seconds, and by how much the peak of the memory has grown since before the first."""
        return self._ask("step")

    def close(self) -> dict:
        """The bytes of a chunk and a digest of the parameters."""
        answer = self._ask("end")
        self._process.wait()
        return answer

    def kill(self) -> None:
        """End the process, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def _ask(self, line: str) -> dict:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"paged: a side ended with status {self._process.wait()}")
        return json.loads(answer)
