"""Memory of training runs, as `lowrank.plan_memory` predicts it and as it is measured.

Every run is a process of its own that loads a model and takes two steps on full batches. Its peak
is VmHWM, all that it ever held at once. malloc is told to give back what is freed, as the plan
counts it; what it keeps else depends on the order in which memory was freed, and stands beside.
Both are shown above what a process takes that only trains a model of no size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import lowrank
from benchmarks.errors import MissingInputError
from benchmarks.settings import Settings
from benchmarks.training_step import inputs
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder

ROOT = Path(__file__).parent.parent
WITHIN = 0.10
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
ALL = {"r": 16, "target_modules": "all-linear"}
SMOLLM2 = "SmolLM2-135M"


def random_model(hidden_size: int, layers: int, vocab_size: int, tied: bool) -> DecoderConfig:
    """A Llama of these sizes."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128,
        head_dim=64,
        tie_word_embeddings=tied,
    )


MODELS = {
    "30M": random_model(512, 8, 8000, tied=True),
    "100M": random_model(768, 10, 16000, tied=False),
}


def run_of(model: str, rows: int, length: int, **settings: Any) -> tuple[str, dict[str, Any]]:
    """A model's name, and what its run is told."""
    return model, {"per_device_train_batch_size": rows, "max_length": length, **settings}


RUNS = {
    "full": run_of("30M", 4, 256),
    "full, checkpointing": run_of("30M", 8, 256, gradient_checkpointing=True),
    "full, adamw_8bit": run_of("100M", 2, 128, optim="adamw_8bit"),
    "LoRA": run_of("30M", 8, 256, lora=ALL),
    "LoRA, selective": run_of("100M", 4, 256, lora=ALL, gradient_checkpointing="selective"),
    "QLoRA": run_of("30M", 4, 512, lora=ALL, quantizer="nf4"),
    "QLoRA, checkpointing": run_of(
        "100M", 8, 256, lora=ALL, quantizer="nf4", gradient_checkpointing=True
    ),
    "QLoRA, two batches a step": run_of(
        "30M", 2, 384, lora={**ALL, "r": 64}, quantizer="nf4", gradient_accumulation_steps=2
    ),
    "int8": run_of("30M", 4, 256, lora=ALL, quantizer="int8"),
}
SMOLLM2_RUNS = {
    "QLoRA": run_of(SMOLLM2, 2, 256, lora=ALL, quantizer="nf4"),
    "QLoRA, checkpointing": run_of(
        SMOLLM2, 4, 256, lora=ALL, quantizer="nf4", gradient_checkpointing=True
    ),
    "LoRA": run_of(SMOLLM2, 2, 256, lora={"r": 8}),
}


def run(settings: Settings) -> list[dict]:
    """A case a model, a row a run."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        sources: dict[str, str] = {}
        for model, config in MODELS.items():
            torch.manual_seed(0)
            sources[model] = f"{name}/{model}"
            lowrank.save_model(Decoder(config), sources[model])
        runs = [(what, *told) for what, told in RUNS.items()]
        try:
            sources[SMOLLM2], _ = inputs()
            runs += [(what, *told) for what, told in SMOLLM2_RUNS.items()]
        except MissingInputError as error:
            settings.note(f"memory: without {SMOLLM2}: {error}")
        for what, model, told in runs:
            settings.tell(f"memory: {model}, {what}")
            rows.append(row(what, model, sources[model], told))
    return rows


def row(what: str, model: str, source: str, told: Mapping[str, Any]) -> dict:
    """A run's prediction and measurements; wrong where they are further apart than WITHIN."""
    plan, fixed = predicted(source, told)
    found = {
        "benchmark": "memory",
        "case": model,
        "contender": f"{what}, {told['per_device_train_batch_size']} x {told['max_length']}",
        "path": "",
        "predicted_bytes": plan - fixed,
        "measured_bytes": measured(source, told, GIVES_BACK) - fixed,
        "kept_bytes": measured(source, told, {}) - fixed,
    }
    if abs(found["predicted_bytes"] / found["measured_bytes"] - 1) > WITHIN:
        found["wrong"] = f"the prediction is not within {WITHIN:.0%} of the measurement"
    return found


def predicted(source: str, told: Mapping[str, Any]) -> tuple[int, int]:
    """(peak, what of it is of the process itself) in bytes."""
    options = dict(told)
    lora = options.pop("lora", None)
    plan = lowrank.plan_memory(
        source, None if lora is None else lowrank.LoRAConfig(**lora), device="cpu", **options
    )
    return plan.peak, plan.components["runtime"]


def measured(source: str, told: Mapping[str, Any], environment: Mapping[str, str]) -> int:
    """The peak in bytes of a process that trains as told."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_worker", source, json.dumps(told)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"memory: the run failed:\n{done.stderr[-4000:]}")
    return int(done.stdout.split()[-1])
