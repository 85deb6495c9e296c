"""Settings to begin with, by what a run is for. docs/choosing.md says where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lowrank.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """Fields of LoRAConfig and of TrainConfig; `about` says what for."""

    about: str
    lora: Mapping[str, Any]
    train: Mapping[str, Any]

    def at_rank(self, r: int | None) -> Preset:
        """The same with another rank, lora_alpha in the same proportion to it; itself for None."""
        if not isinstance(r, int):
            return self
        alpha = r * self.lora["lora_alpha"] / self.lora["r"]
        return replace(self, lora={**self.lora, "r": r, "lora_alpha": alpha})


PRESETS = {
    "quick": Preset(
        "a first look, or a style and a format: attention alone, one epoch",
        {"r": 8, "lora_alpha": 16, "target_modules": "attention", "lora_dropout": 0.05},
        {"learning_rate": 3e-4, "num_train_epochs": 1.0},
    ),
    "general": Preset(
        "instructions and answers, some thousand examples",
        {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.05},
        {"learning_rate": 2e-4, "num_train_epochs": 3.0},
    ),
    "complex": Preset(
        "code, reasoning, a field of knowledge",
        {"r": 64, "lora_alpha": 128, "target_modules": "all-linear", "lora_dropout": 0.05},
        {"learning_rate": 1e-4, "num_train_epochs": 3.0, "warmup_ratio": 0.1},
    ),
    "large-data": Preset(
        "tens of thousands of examples and more: each is seen once or twice",
        {"r": 64, "lora_alpha": 128, "target_modules": "all-linear", "lora_dropout": 0.0},
        {"learning_rate": 2e-4, "num_train_epochs": 1.0, "gradient_accumulation_steps": 4},
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name: `LoRAConfig(**preset(name).lora)`. Raises ConfigError."""
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]
