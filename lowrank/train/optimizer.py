"""The optimizers that `TrainConfig.optim` names, over the parameters that are to be trained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from lowrank.optim import (
    AdamW,
    AdamW8bit,
    Lion,
    Lion8bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedLion,
    PagedLion8bit,
)
from lowrank.surgery import lora_plus_groups

if TYPE_CHECKING:
    from lowrank.train.config import TrainConfig

Groups = Iterable[dict[str, Any]]  # with params, lr and weight_decay
Maker = Callable[[Groups, "TrainConfig"], Optimizer]
Family = Callable[[Callable[..., Optimizer]], Maker]
BUDGETS = ("device_budget", "host_budget", "page_dir")  # fields of the config


def adamw(kind: Callable[..., Optimizer]) -> Maker:
    """Makes that kind of AdamW as the config says."""

    def make(groups: Groups, config: TrainConfig) -> Optimizer:
        betas = (config.adam_beta1, config.adam_beta2)
        return kind(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)

    return make


def lion(kind: Callable[..., Optimizer]) -> Maker:
    """Makes that kind of Lion, with AdamW's betas as in transformers."""

    def make(groups: Groups, config: TrainConfig) -> Optimizer:
        betas = (config.adam_beta1, config.adam_beta2)
        return kind(groups, lr=config.learning_rate, betas=betas)

    return make


def sgd(groups: Groups, config: TrainConfig) -> Optimizer:
    """torch's, without momentum."""
    return torch.optim.SGD(groups, lr=config.learning_rate)


def paged(family: Family, kind: Callable[..., Optimizer]) -> Maker:
    """Makes that kind of a family, with the budgets of the config for what is in pages."""

    def make(groups: Groups, config: TrainConfig) -> Optimizer:
        budgets = {name: getattr(config, name) for name in BUDGETS}
        return family(functools.partial(kind, **budgets))(groups, config)

    return make


OPTIMIZERS: dict[str, Maker] = {
    "adamw_torch": adamw(AdamW),
    "adamw_torch_fused": adamw(AdamW),
    "adamw_8bit": adamw(AdamW8bit),
    "adamw_bnb_8bit": adamw(AdamW8bit),
    "adamw_torch_8bit": adamw(AdamW8bit),
    "lion_32bit": lion(Lion),
    "lion_8bit": lion(Lion8bit),
    "paged_adamw_32bit": paged(adamw, PagedAdamW),
    "paged_adamw_8bit": paged(adamw, PagedAdamW8bit),
    "paged_lion_32bit": paged(lion, PagedLion),
    "paged_lion_8bit": paged(lion, PagedLion8bit),
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
