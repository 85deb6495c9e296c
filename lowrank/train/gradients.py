"""What is trained and its gradients: which parameters, whether they learn, norm, checkpointing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError, TrainingError
from lowrank.optim.shards import is_sharded, local
from lowrank.surgery.checkpointing import can_checkpoint, is_checkpointing, set_checkpointing
from lowrank.train.distributed import Ranks

logger = logging.getLogger("lowrank.train")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Names and parameters that require a gradient; ConfigError if there are none."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no trainable parameter: all are frozen; "
            "add an adapter with lowrank.inject(model, LoRAConfig(...))"
        )
    return found


def check_gradients(parameters: dict[str, nn.Parameter], ranks: Ranks) -> None:
    """After the first backward: TrainingError if no gradient came, a warning for layers without.

    The two matrices of an adapter count as one, since the gradient of A is zero while B is.
    """
    learns: dict[str, bool] = {}
    for name, p in parameters.items():
        layer = name.split(".lora_")[0]
        learns[layer] = learns.get(layer, False) or (
            p.grad is not None and bool(local(p.grad).count_nonzero())
        )
    if any(map(is_sharded, parameters.values())):
        learns = dict(zip(learns, ranks.any(*learns.values()), strict=True))
    silent = [layer for layer, has in learns.items() if not has]
    if len(silent) == len(learns):
        raise TrainingError(
            f"step 1: the gradient of all {len(parameters)} trainable tensors is zero or missing, "
            f"so nothing would be learned: does the loss depend on them ({silent[0]}, ...)?"
        )
    if silent:
        logger.warning(
            "%d of %d trained layers get no gradient: %s",
            len(silent),
            len(learns),
            ", ".join(silent[:5]),
        )


def check_values(parameters: dict[str, nn.Parameter], step: int, ranks: Ranks) -> None:
    """TrainingError if the last update, which no loss has seen yet, left a value not finite."""
    wrong = [not bool(local(p).isfinite().all()) for p in parameters.values()]
    if any(map(is_sharded, parameters.values())):
        wrong = ranks.any(*wrong)
    for name, is_wrong in zip(parameters, wrong, strict=True):
        if is_wrong:
            error = TrainingError(
                f"step {step}: {name} is NaN or inf after it and nothing is saved: "
                "lower learning_rate"
            )
            raise ranks.known(error)


def clip(parameters: Iterable[nn.Parameter], max_norm: float, ranks: Ranks) -> Tensor:
    """Scale the gradients to a global 2-norm of at most `max_norm` (0: any); returns their norm."""
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if any(map(is_sharded, grads)):
        return _clip_sharded([local(grad) for grad in grads], max_norm, ranks)
    if max_norm:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    return nn.utils.get_total_norm(grads)


def _clip_sharded(grads: list[Tensor], max_norm: float, ranks: Ranks) -> Tensor:
    """The same of what each rank has of them."""
    parts = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads])
    (squares,) = ranks.sum([parts.double().square().sum().item()])
    norm = squares**0.5
    if max_norm and not norm <= max_norm:
        for grad in grads:
            grad.mul_(max_norm / (norm + 1e-6))
    return torch.tensor(norm, dtype=torch.float32)


def check_checkpointing(model: nn.Module, wanted: bool | str) -> None:
    """ConfigError if the model cannot do what `gradient_checkpointing` asks of it."""
    if not wanted or can_checkpoint(model, wanted):
        return
    name = type(model).__name__
    if wanted == "selective" and can_checkpoint(model):
        raise ConfigError(
            f"gradient_checkpointing is 'selective', which {name} cannot do: use true"
        )
    raise ConfigError(
        f"gradient_checkpointing is on, but {name} has no attribute of that name to set: "
        "turn it off, or give the model one"
    )


@contextlib.contextmanager
def gradient_checkpointing(model: nn.Module, wanted: bool | str) -> Iterator[None]:
    """Recompute activations in the backward while inside, through the model's own switch."""
    before = is_checkpointing(model)
    if wanted:
        set_checkpointing(model, wanted)
    try:
        yield
    finally:
        if wanted:
            set_checkpointing(model, before)
