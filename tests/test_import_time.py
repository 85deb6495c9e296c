"""`import lowrank` costs next to nothing over `import torch` and brings nothing optional."""

from __future__ import annotations

import json
import subprocess
import sys

BUDGET_SECONDS = 0.15

PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
cpu, wall = time.process_time(), time.perf_counter()
import lowrank
cost = min(time.process_time() - cpu, time.perf_counter() - wall)
new = {m.split(".")[0] for m in set(sys.modules) - before}
print(json.dumps({"cost": cost, "new": sorted(new)}))
"""

LATER = {"triton", "tokenizers", "jinja2", "gguf", "matplotlib", "huggingface_hub", "tqdm", "numpy"}
NEVER = {"transformers", "peft", "bitsandbytes", "accelerate", "trl", "kernels"}


def probe() -> dict:
    ran = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    return json.loads(ran.stdout)


def test_import_is_quick():
    costs = [probe()["cost"] for _ in range(3)]
    assert min(costs) < BUDGET_SECONDS, f"import lowrank took {costs} s over import torch"


def test_import_brings_nothing_optional():
    assert (LATER | NEVER).intersection(probe()["new"]) == set()
