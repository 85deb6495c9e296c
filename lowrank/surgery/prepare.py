"""A quantized model made ready for training, by the tutorials' name for it."""

from __future__ import annotations

import torch
from torch import nn

from lowrank.errors import ConfigError

from .checkpointing import can_checkpoint, set_checkpointing
from .targets import adapter_names


def prepare_for_kbit_training(
    model: nn.Module, use_gradient_checkpointing: bool = True, upcast_norms: bool = False
) -> nn.Module:
    """Freeze the model and have it recompute activations in the backward; `inject` comes next.

    Checkpointing is turned on by the model's own switch, and what comes out of the embedding of a
    transformers model is made to require a gradient, for checkpointing that needs it. With
    `upcast_norms`, what 16-bit norms hold becomes float32, for training under autocast; nothing
    else is, unlike in PEFT, whose float32 embeddings and head take more than the 4 bits save.

    Returns the model. Raises ConfigError, the model as it was, if it has adapters, which would be
    frozen too, or no such switch.
    """
    if adapter_names(model):
        raise ConfigError(
            "prepare_for_kbit_training: expected a model without adapters, as it freezes all; got "
            f"{', '.join(map(repr, adapter_names(model)))}: call it before inject"
        )
    if use_gradient_checkpointing and not can_checkpoint(model):
        raise ConfigError(
            f"use_gradient_checkpointing: {type(model).__name__} has no attribute "
            "`gradient_checkpointing` and no method `gradient_checkpointing_enable`; pass False"
        )
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        set_checkpointing(model, True)
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
    for module in model.modules() if upcast_norms else ():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters(recurse=False):
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
    return model
