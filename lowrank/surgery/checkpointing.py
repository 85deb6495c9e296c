"""A model's own switch for recomputing activations in the backward."""

from __future__ import annotations

from torch import nn


def can_checkpoint(model: nn.Module, how: bool | str = True) -> bool:
    """Whether the model has a switch for recomputing activations in the backward, with this on it.

    "selective" is for models that say `supports_selective_checkpointing`.
    """
    if isinstance(how, str):
        return how == "selective" and getattr(model, "supports_selective_checkpointing", False)
    return hasattr(model, "gradient_checkpointing") or _stem(model) is not None


def is_checkpointing(model: nn.Module) -> bool | str:
    """How the switch stands: False, True or "selective"."""
    if hasattr(model, "gradient_checkpointing"):
        return model.gradient_checkpointing
    return bool(getattr(model, f"is_{_stem(model)}", False))


def set_checkpointing(model: nn.Module, on: bool | str) -> None:
    """Recompute activations in the backward, or no longer, through the model's own switch.

    That is the attribute `gradient_checkpointing`, or the pair of methods of transformers' models.
    """
    if hasattr(model, "gradient_checkpointing"):
        model.gradient_checkpointing = on
    elif not on:
        getattr(model, f"{_stem(model)}_disable")()
    else:
        # the reentrant kind loses the gradient where the embedding is frozen
        options = {f"{_stem(model)}_kwargs": {"use_reentrant": False}}
        getattr(model, f"{_stem(model)}_enable")(**options)


def _stem(model: nn.Module) -> str | None:
    """The stem of transformers' methods: the name of its version 5.23 and later, or that before."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    return next((name for name in names if hasattr(model, f"{name}_enable")), None)
