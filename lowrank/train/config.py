"""What a training run is told, under the names that users of transformers and TRL know."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lowrank.errors import ConfigError
from lowrank.train.optimizer import OPTIMIZERS
from lowrank.train.schedule import SCHEDULES

# what a number is expected to be, its types, and the test of its value
Rule = tuple[str, type | tuple[type, ...], Callable[[Any], bool]]
WHOLE: Rule = ("a whole number of at least 1", int, lambda v: v >= 1)
NOT_NEGATIVE: Rule = ("a number of at least 0", (int, float), lambda v: 0 <= v < math.inf)
BELOW_ONE: Rule = ("a number from 0 to below 1", (int, float), lambda v: 0 <= v < 1)
NUMBERS: dict[str, Rule] = {
    "learning_rate": NOT_NEGATIVE,
    "warmup_ratio": ("a number from 0 to 1", (int, float), lambda v: 0 <= v <= 1),
    "warmup_steps": (
        "a whole number of steps, or a share below 1",
        (int, float),
        lambda v: 0 <= v < math.inf and (v < 1 or v == int(v)),
    ),
    "num_train_epochs": ("a number above 0 and below 2**31", (int, float), lambda v: 0 < v < 2**31),
    "max_steps": ("-1, or a whole number of at least 1", int, lambda v: v == -1 or v >= 1),
    "per_device_train_batch_size": WHOLE,
    "per_device_eval_batch_size": WHOLE,
    "gradient_accumulation_steps": WHOLE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": BELOW_ONE,
    "adam_beta2": BELOW_ONE,
    "adam_epsilon": NOT_NEGATIVE,
    "loraplus_lr_ratio": (
        "None or a number above 0",
        (int, float, type(None)),
        lambda v: v is None or 0 < v < math.inf,
    ),
    "loraplus_lr_embedding": ("a number above 0", (int, float), lambda v: 0 < v < math.inf),
    "max_grad_norm": NOT_NEGATIVE,
    "max_length": WHOLE,
    "eval_steps": (
        "None or a whole number of at least 1",
        (int, type(None)),
        lambda v: v is None or v >= 1,
    ),
    "logging_steps": WHOLE,
    "seed": ("a whole number from 0 to below 2**63", int, lambda v: 0 <= v < 2**63),
}


@dataclass
class TrainConfig:
    """Settings of one training run. A value that cannot be is a ConfigError naming its field.

    output_dir: where the adapter, the metrics and the configuration go; refused if it holds a run.
    overwrite_output_dir: replace the run that output_dir holds; its files go when this one begins.
    learning_rate: the highest that the schedule reaches.
    lr_scheduler_type: linear or cosine (both fall to 0), or constant; each after the warmup.
    warmup_ratio: the share of all steps in which the learning rate rises from 0.
    warmup_steps: the same as a number of steps, or as a share if below 1; 0: warmup_ratio.
    num_train_epochs: times that every example is seen; may be a fraction.
    max_steps: optimizer steps; -1 takes them from num_train_epochs.
    per_device_train_batch_size: examples in one forward and backward.
    per_device_eval_batch_size: examples in one forward of the evaluation.
    gradient_accumulation_steps: batches whose gradients make one optimizer step.
    optim: the optimizer; adamw_torch is torch's fused AdamW.
    weight_decay: decoupled, on matrices only (not on biases and norms).
    adam_beta1, adam_beta2: decay of the means of the gradient and of its square.
    adam_epsilon: added to the root of the latter.
    loraplus_lr_ratio: LoRA+: B learns with that many times the rate of A; 16 is usual. None: 1.
    loraplus_lr_embedding: with that, the rate of adapters of embeddings.
    max_grad_norm: clip the global norm of the gradient to this; 0 does not clip.
    bf16: compute in bfloat16 under autocast.
    gradient_checkpointing: recompute activations in the backward: less memory, more time.
    max_length: tokens an example may have; longer ones are cut.
    padding_free: lay the examples of a batch end to end, if the model confines attention to each.
    completion_only_loss: learn completions and the assistant's turns only; otherwise all tokens.
    eval_steps: evaluate after every so many steps too, not only before and after training.
    logging_steps: steps between lines of the log; metrics.jsonl has every step.
    disable_tqdm: lines of the log in place of the progress bar, as where there is no terminal.
    seed: of the order of the examples and of dropout.
    """

    output_dir: str | Path
    overwrite_output_dir: bool = False
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int | float = 0
    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    optim: str = "adamw_torch"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6
    max_grad_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    max_length: int = 1024
    padding_free: bool = True
    completion_only_loss: bool = True
    eval_steps: int | None = None
    logging_steps: int = 10
    disable_tqdm: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        if not isinstance(self.output_dir, str | Path) or not str(self.output_dir):
            raise ConfigError(f"output_dir must be a path; got {self.output_dir!r}")
        for name, known in (("lr_scheduler_type", SCHEDULES), ("optim", OPTIMIZERS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise ConfigError(f"{field.name} must be true or false; got {value!r}")
            if field.name in NUMBERS:
                expected, kind, allowed = NUMBERS[field.name]
                if isinstance(value, bool) or not isinstance(value, kind) or not allowed(value):
                    raise ConfigError(f"{field.name} must be {expected}; got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Names and values, ready for JSON or TOML."""
        return {**asdict(self), "output_dir": str(self.output_dir)}
