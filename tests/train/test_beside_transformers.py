"""Whole runs beside transformers' own Trainer: losses, norms of the gradient, rates, weights."""

from __future__ import annotations

import pytest
import torch

from lowrank.data import epoch_order
from lowrank.train import TrainConfig, Trainer

from .support import examples, metrics_lines
from .test_decoder_training import SHAPE, decoder

transformers = pytest.importorskip("transformers", reason="the oracle; pip install transformers")
pytest.importorskip("accelerate", reason="its Trainer needs it; pip install accelerate")

COUNT, SEED = 13, 42


def padded(rows):
    """A batch for transformers: padded on the right, the first label of each example -100."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        pad = longest - len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [0] * pad)
        batch["labels"].append([-100, *row["labels"][1:]] + [-100] * pad)
        batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * pad)
    return {name: torch.tensor(values) for name, values in batch.items()}


class Watched(transformers.Trainer):
    """Keeps the part of the loss of every micro-batch, and what it logs."""

    def __init__(self, *args, **rest):
        super().__init__(*args, **rest)
        self.parts = []

    def training_step(self, *args, **rest):
        self.parts.append(super().training_step(*args, **rest).item())
        return torch.tensor(self.parts[-1])


def their_run(path, model, rows, batch, accumulation, settings):
    """Losses, norms and rates of each step of one epoch, over the rows in our order."""
    arguments = transformers.TrainingArguments(
        output_dir=path, use_cpu=True, num_train_epochs=1, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, optim="adamw_torch", logging_steps=1,
        train_sampling_strategy="sequential", save_strategy="no", report_to="none",
        disable_tqdm=True, remove_unused_columns=False, **settings,
    )  # fmt: skip
    ordered = [rows[i] for i in epoch_order(COUNT, SEED, 0)]
    trainer = Watched(model, arguments, data_collator=padded, train_dataset=ordered)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    parts = [
        trainer.parts[i : i + accumulation] for i in range(0, len(trainer.parts), accumulation)
    ]
    norms, rates = ([line[name] for line in lines] for name in ("grad_norm", "learning_rate"))
    return [sum(part) for part in parts], norms, rates


@pytest.mark.parametrize(
    "batch, accumulation, settings",
    [
        (4, 1, {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.3}),
        (2, 3, {"lr_scheduler_type": "linear", "weight_decay": 0.1, "adam_beta2": 0.95}),
        (
            3,
            2,
            {
                "label_smoothing_factor": 0.2,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.2},
            },
        ),
        (4, 1, {"bf16": True, "lr_scheduler_type": "constant"}),
        (
            4,
            1,
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 2},
                "warmup_steps": 0.25,
            },
        ),
    ],
    ids=["cosine", "accumulated", "smoothed", "bf16", "stable"],
)
def test_trains_as_transformers_does(tmp_path, generator, batch, accumulation, settings):
    """Ours end to end, theirs padded; accumulation is by tokens, the last window is short."""
    rows = examples(COUNT, generator)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    ours = decoder()
    ours.load_state_dict(theirs.state_dict())
    shared = {"learning_rate": 3e-3, "max_grad_norm": 1.0, **settings}
    config = TrainConfig(
        tmp_path / "ours", num_train_epochs=1, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, warmup_ratio=0.0, seed=SEED, **shared,
    )  # fmt: skip
    result = Trainer(ours, config, rows).train()
    losses, norms, rates = their_run(tmp_path, theirs, rows, batch, accumulation, shared)
    lines = metrics_lines(tmp_path / "ours")
    loose = 2e-2 if settings.get("bf16") else 2e-4
    assert len(losses) == len(result.losses) == -(-COUNT // (batch * accumulation))
    torch.testing.assert_close(result.losses, losses, rtol=loose / 10, atol=0)
    torch.testing.assert_close([line["grad_norm"] for line in lines], norms, rtol=loose, atol=0)
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates, rel=1e-9)
