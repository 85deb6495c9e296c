"""What `import lowrank` adds to `import torch`, and what the peers' imports add, each in a fresh
process.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from benchmarks.harness import spread
from benchmarks.settings import Settings

REPEATS = 5
PACKAGES = ("bitsandbytes", "torchao", "peft")
SCRIPT = """
import logging, time
logging.disable(logging.CRITICAL)
import torch
start = time.perf_counter()
import {name}
print(time.perf_counter() - start)
"""


def run(settings: Settings) -> list[dict]:
    """One case: every package after torch, in turn."""
    names = ["lowrank", *(name for name in PACKAGES if name in settings.against)]
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(REPEATS + 1):
        for name in names:
            took = _import_seconds(name)
            if turn:  # the first round reads the files from disk
                times[name].append(took)
    ours = statistics.median(times["lowrank"])
    return [
        {
            "benchmark": "import_time",
            "case": "import after torch",
            "contender": name,
            "path": "",
            **spread(taken),
            "baseline": "lowrank",
            "speed": ours / statistics.median(taken),
        }
        for name, taken in times.items()
    ]


def _import_seconds(name: str) -> float:
    script = SCRIPT.format(name=name)
    # an installed package is compiled to bytecode; a checkout is when it is first imported
    compiled = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=compiled
    )
    return float(done.stdout.split()[-1])
