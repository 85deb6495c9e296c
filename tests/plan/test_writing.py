"""What writing takes: the model, what layers still see of keys and values, and to read prompts."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch

import lowrank
from lowrank.models.cache import KVCache
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.plan import plan_memory

SIZES = dict(
    vocab_size=4000,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=1 << 16,
)
WRITES = """
import sys
import torch, lowrank
from lowrank.models.generate import generate_ids
source, rows, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = lowrank.load_model(source, quantizer="nf4")
lowrank.inject(model, lowrank.LoRAConfig(r=8))
prompts = torch.randint(0, model.config.vocab_size, (rows, length - 3)).tolist()
assert len(generate_ids(model, prompts, 4)) == rows
with open("/proc/self/status") as file:  # ru_maxrss would be that of the process before it, too
    print(next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")))
"""


def config(**changes) -> DecoderConfig:
    return DecoderConfig.from_hf({"model_type": "mistral", **SIZES, **changes})


def writing(config: DecoderConfig, rows: int, length: int, **options) -> int:
    lora = lowrank.LoRAConfig(r=8)
    batch = dict(per_device_train_batch_size=rows, max_length=length)
    return plan_memory(config, lora, quantizer="nf4", device="cpu", **batch, **options).writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_grow_with_the_text_but_not_past_a_window(dtype):
    of_position = 2 * 8 * 512 * dtype.itemsize
    plain, window = config(sliding_window=None), config(sliding_window=512)
    more = writing(plain, 3, 8192, dtype=dtype) - writing(plain, 3, 4096, dtype=dtype)
    assert more > 3 * 4096 * of_position
    assert writing(window, 3, 8192, dtype=dtype) == writing(window, 3, 4096, dtype=dtype)
    assert writing(plain, 6, 512, dtype=dtype) > writing(plain, 3, 512, dtype=dtype)
    cache = KVCache(window, 3, 8192, dtype=dtype, device="meta")
    assert sum(t.nbytes for t in (*cache.keys, *cache.values)) == 3 * (512 + 64) * of_position


def test_a_plan_can_be_pickled():
    plan = plan_memory(config(), lowrank.LoRAConfig(r=8), device="cpu", max_length=64)
    other = pickle.loads(pickle.dumps(plan))
    assert (other.components, other.writing) == (plan.components, plan.writing)


@pytest.mark.slow
@pytest.mark.parametrize("window, rows, length", [(None, 16, 400), (512, 2, 3000)])
def test_within_a_tenth_of_what_is_measured(window, rows, length, tmp_path):
    lowrank.save_model(Decoder(config(sliding_window=window)), tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", WRITES, str(tmp_path / "model"), str(rows), str(length)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    measured = int(done.stdout.splitlines()[-1])
    assert writing(config(sliding_window=window), rows, length) == pytest.approx(measured, rel=0.1)
