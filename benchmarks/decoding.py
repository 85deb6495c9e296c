"""Writing text with SmolLM2-135M: tokens a second and memory, beside transformers.

After one prompt of E2E, and after four of different lengths together, every side writes as many
tokens, greedily. A side is a process of its own; each writes in turn, and the turns are repeated.
Reading the prompt is part of the time. Peak memory is above the process with `import torch` done.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import peers
from benchmarks.harness import spread
from benchmarks.settings import Settings
from benchmarks.training_step import Worker, convert, inputs

NEW_TOKENS = 32
TURNS = 3
WARM_UP = 1  # turns left out of the times
OURS = ("lowrank", "lowrank, adapter", "lowrank, head in NF4 too", "lowrank, dense fp32")
DENSE, NF4, NF4_ADAPTER = "transformers, dense fp32", "bitsandbytes", "bitsandbytes, peft adapter"


def run(settings: Settings) -> list[dict]:
    """Two cases, every side. Raises MissingInputError."""
    gguf, pairs = inputs()
    sides = [*OURS]
    if "torch" in settings.against:
        sides.append(DENSE)
    if "bitsandbytes" in settings.against:
        sides.append(NF4)
        if "peft" in settings.against and peers.missing("peft") is None:
            sides.append(NF4_ADAPTER)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        settings.tell("decoding: converting the model")
        convert(gguf, pairs, directory, 1)
        workers: list[Worker] = []
        try:
            for side in sides:
                settings.tell(f"decoding: {side} loads")
                workers.append(Worker(side, directory, "benchmarks.decoding_worker"))
            rows = []
            for prompts in (1, 4):
                answers = _take_turns(workers, prompts, settings)
                rows += rows_of(prompts, dict(zip(sides, answers, strict=True)), workers)
        finally:
            for worker in workers:
                worker.close()
    return rows


def rows_of(prompts: int, answers: dict[str, list[dict]], workers: Sequence[Worker]) -> list[dict]:
    """A row a side; ours in float32 is wrong where it writes other tokens than transformers."""
    case = f"SmolLM2-135M, {NEW_TOKENS} tokens after {prompts} prompt{'s'[: prompts > 1]}, greedily"
    reference = next(side for side in (NF4, DENSE, OURS[0]) if side in answers)
    times = {
        side: [answer["seconds"] / NEW_TOKENS for answer in done[WARM_UP:]]
        for side, done in answers.items()
    }
    rows = []
    for (side, done), worker in zip(answers.items(), workers, strict=True):
        row = {
            "benchmark": "decoding",
            "case": case,
            "contender": side,
            "path": "",
            **spread(times[side]),
            "new_tokens": NEW_TOKENS,
            "written_per_second": prompts / statistics.median(times[side]),
            "baseline": reference,
            "speed": statistics.median(times[reference]) / statistics.median(times[side]),
            "peak_bytes": max(answer["peak_bytes"] for answer in done),
            "load_peak_bytes": worker.loaded["load_peak_bytes"],
        }
        if DENSE in answers:
            row["over_dense"] = statistics.median(times[DENSE]) / statistics.median(times[side])
        if side == OURS[-1] and DENSE in answers and done[0]["ids"] != answers[DENSE][0]["ids"]:
            row["wrong"] = f"it writes other tokens than {DENSE}"
        rows.append(row)
    return rows


def _take_turns(workers: list[Worker], prompts: int, settings: Settings) -> list[list[dict]]:
    answers: list[list[dict]] = [[] for _ in workers]
    for turn in range(TURNS + WARM_UP):
        for position in range(len(workers)):
            which = (position + turn) % len(workers)
            answers[which].append(workers[which].ask(json.dumps([prompts, NEW_TOKENS])))
        rates = ", ".join(
            f"{worker.side} {prompts * NEW_TOKENS / done[-1]['seconds']:.1f}"
            for worker, done in zip(workers, answers, strict=True)
        )
        settings.tell(f"decoding: turn {turn + 1} of {TURNS + WARM_UP}, tokens/s: {rates}")
    return answers
