"""LoRA+: B learns faster than A.   arXiv:2402.12354."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lowrank.errors import ConfigError, TargetError
from lowrank.nn.adapted import AdaptedLayer
from lowrank.nn.lora_embedding import LoRAEmbedding


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    lr_embedding: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """What trains in the model, as parameter groups of any optimizer of torch's kind.

    B, magnitudes, biases and norms have lr · ratio, adapters of embeddings `lr_embedding`, A and
    the rest lr; biases and norms no weight decay. As PEFT's create_loraplus_optimizer has them.
    """
    for name, value in (("lr", lr), ("ratio", ratio), ("lr_embedding", lr_embedding)):
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise ConfigError(f"{name}: expected a finite number above 0; got {value!r}")
    tables, adapted = set(), set()
    for module in model.modules():
        if isinstance(module, AdaptedLayer):
            own = [p for name, p in module.named_parameters() if not name.endswith("bias")]
            adapted.update(own)
            tables.update(own if isinstance(module, LoRAEmbedding) else ())
    slow, embedded, fast, undecayed = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter in tables:
            embedded.append(parameter)
        elif parameter.ndim > 1 and "lora_B" not in name:
            slow.append(parameter)
        else:
            (fast if parameter in adapted else undecayed).append(parameter)
    if not (slow or embedded or fast or undecayed):
        raise TargetError("lora_plus_groups: nothing in the model trains; inject an adapter first")
    groups = [
        {"params": slow, "lr": lr, "weight_decay": weight_decay},
        {"params": embedded, "lr": lr_embedding, "weight_decay": weight_decay},
        {"params": fast, "lr": lr * ratio, "weight_decay": weight_decay},
        {"params": undecayed, "lr": lr * ratio, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
