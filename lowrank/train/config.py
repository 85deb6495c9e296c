"""What a training run is told: one dataclass with the names that transformers' and TRL's users know."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lowrank.errors import ConfigError
from lowrank.train.optimizer import OPTIMIZERS
from lowrank.train.schedule import SCHEDULES


@dataclass
class TrainConfig:
    """Settings of one training run. Raises ConfigError, naming the field, for a value that cannot be.

    output_dir: where adapter, metrics and configuration go; refused if it holds a run already,
        unless `overwrite_output_dir`, which removes that run's files when this one begins.
    max_steps: optimizer steps, -1 to take them from num_train_epochs.
    warmup_steps: steps of linear warmup, or a share of all steps if below 1; 0 leaves it to warmup_ratio.
    weight_decay: decoupled, on matrices only (not on biases and norms).
    max_grad_norm: clip the global norm of the gradient to this; None does not clip.
    max_length: tokens an example may have; longer ones are cut.
    padding_free: lay the examples of a batch end to end, where the model can confine attention to each.
    completion_only_loss: learn completions and assistant turns only; otherwise prompts too.
    eval_steps: evaluate after every so many steps too, not only before and after training.
    logging_steps: steps between lines through `logging`; metrics.jsonl has every step.
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
    max_grad_norm: float | None = 1.0
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
        for name in ("overwrite_output_dir", "bf16", "gradient_checkpointing", "padding_free",
                     "completion_only_loss", "disable_tqdm"):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false; got {getattr(self, name)!r}")
        self._choice("lr_scheduler_type", SCHEDULES)
        self._choice("optim", OPTIMIZERS)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size",
                     "gradient_accumulation_steps", "max_length", "logging_steps"):  # fmt: skip
            self._number(name, "a whole number of at least 1", whole=True, low=1)
        if self.eval_steps is not None:
            self._number("eval_steps", "None or a whole number of at least 1", whole=True, low=1)
        self._number("seed", "a whole number of at least 0", whole=True, low=0)
        self._number("max_steps", "-1, or a whole number of at least 1", whole=True, low=-1)
        if self.max_steps == 0:
            raise ConfigError("max_steps must be -1, or a whole number of at least 1; got 0")
        self._number("num_train_epochs", "a number above 0", above=0)
        self._number("learning_rate", "a number of at least 0", low=0)
        self._number("weight_decay", "a number of at least 0", low=0)
        self._number("adam_beta1", "a number from 0 to below 1", low=0, below=1)
        self._number("adam_beta2", "a number from 0 to below 1", low=0, below=1)
        self._number("adam_epsilon", "a number of at least 0", low=0)
        self._number("warmup_ratio", "a number from 0 to 1", low=0, high=1)
        self._number("warmup_steps", "a whole number of steps, or a share below 1", low=0)
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ConfigError(
                f"warmup_steps must be a whole number of steps, or a share below 1; got {self.warmup_steps}"
            )
        if self.max_grad_norm is not None:
            self._number("max_grad_norm", "None or a number above 0", above=0)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from names and values, as a TOML file has them; ConfigError for a name that is no field."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = (
                    f"did you mean '{near[0]}'?" if near else f"the fields are {', '.join(known)}"
                )
                raise ConfigError(f"TrainConfig has no field '{name}': {hint}")
        if "output_dir" not in values:
            raise ConfigError(
                "TrainConfig needs output_dir, the directory for the run's files; got none"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Names and values, ready for JSON or TOML."""
        return {**asdict(self), "output_dir": str(self.output_dir)}

    def _choice(self, name: str, known: Mapping[str, Any]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) or value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}; got {value!r}")

    def _number(
        self, name, expected, whole=False, low=None, above=None, below=None, high=None
    ) -> None:
        value = getattr(self, name)
        ok = (
            isinstance(value, int if whole else int | float)
            and not isinstance(value, bool)
            and abs(value) < float("inf")
            and (low is None or value >= low)
            and (above is None or value > above)
            and (below is None or value < below)
            and (high is None or value <= high)
        )
        if not ok:
            raise ConfigError(f"{name} must be {expected}; got {value!r}")
