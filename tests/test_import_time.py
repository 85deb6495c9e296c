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


TRAINED_HEAD = """
import sys, torch
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
config = DecoderConfig.from_hf({"model_type": "llama", "num_attention_heads": 2, **sizes})
model, ids = Decoder(config), torch.ones(1, 8, dtype=torch.long)
model.loss(ids, ids).backward()
assert model.lm_head.weight.grad is not None
print("torch._dynamo" in sys.modules)
"""


def test_a_head_that_is_trained_brings_no_compiler():
    """Which takes a second and 90 MB."""
    words = [sys.executable, "-c", TRAINED_HEAD]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
