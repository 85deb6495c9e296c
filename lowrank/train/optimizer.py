"""The optimizers that `TrainConfig.optim` names, over the parameters that are to be trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from lowrank.optim import AdamW, AdamW8bit, Lion, Lion8bit
from lowrank.surgery import lora_plus_groups

if TYPE_CHECKING:
    from lowrank.train.config import TrainConfig

Groups = Iterable[dict[str, Any]]  # with params, lr and weight_decay


def adamw(kind: Callable[..., Optimizer]) -> Callable[[Groups, TrainConfig], Optimizer]:
    """Makes that kind of AdamW as the config says."""

    def make(groups: Groups, config: TrainConfig) -> Optimizer:
        betas = (config.adam_beta1, config.adam_beta2)
        return kind(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)

    return make


def lion(kind: Callable[..., Optimizer]) -> Callable[[Groups, TrainConfig], Optimizer]:
    """Makes that kind of Lion, with AdamW's betas as in transformers."""

    def make(groups: Groups, config: TrainConfig) -> Optimizer:
        betas = (config.adam_beta1, config.adam_beta2)
        return kind(groups, lr=config.learning_rate, betas=betas)

    return make


def sgd(groups: Groups, config: TrainConfig) -> Optimizer:
    """torch's, without momentum."""
    return torch.optim.SGD(groups, lr=config.learning_rate)


OPTIMIZERS: dict[str, Callable[[Groups, TrainConfig], Optimizer]] = {
    "adamw_torch": adamw(AdamW),
    "adamw_torch_fused": adamw(AdamW),
    "adamw_8bit": adamw(AdamW8bit),
    "adamw_bnb_8bit": adamw(AdamW8bit),
    "adamw_torch_8bit": adamw(AdamW8bit),
    "lion_32bit": lion(Lion),
    "lion_8bit": lion(Lion8bit),
    "sgd": sgd,
}


def parameter_groups(
    model: nn.Module, parameters: Iterable[nn.Parameter], config: TrainConfig
) -> list[dict[str, Any]]:
    """The `parameters` of the model that train, with the rates and the decay of the config."""
    lr, decay = config.learning_rate, config.weight_decay
    if config.loraplus_lr_ratio is not None:
        ratio, lr_embedding = config.loraplus_lr_ratio, config.loraplus_lr_embedding
        return lora_plus_groups(model, lr, ratio, lr_embedding, decay)
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1], "lr": lr, "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]
