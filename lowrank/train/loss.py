"""The loss of a batch, for any module that predicts the next token."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.data import Batch
from lowrank.data.tokens import IGNORED
from lowrank.errors import ConfigError, ShapeError

# the batch -> the sum over its labelled tokens of the next-token cross entropy, fp32, a scalar
BatchLoss = Callable[[Batch], Tensor]


def packs(model: nn.Module) -> bool:
    """Whether the model confines attention to each of several examples laid end to end."""
    return bool(getattr(model, "supports_packing", False)) and hasattr(model, "loss")


def batch_loss(model: nn.Module, label_smoothing: float = 0.0) -> BatchLoss:
    """How to get this model's loss of a batch: the sum of -log p(labels[s] | input_ids[:s]).

    With `label_smoothing` e it is (1 - e) of that and e of the mean of -log p over all words.

    A model that packs has `loss(input_ids, labels, position_ids=, attention_mask=)`, which returns
    that sum over the labels that are not -100. Any other is called with input_ids, also with
    attention_mask if its forward has it; it returns logits [B, S, V] or something with `.logits`.
    With packs it is given position_ids and a mask [B, 1, S, S] to add to the scores of attention.
    """
    if packs(model):
        options = {"label_smoothing": label_smoothing} if label_smoothing else {}
        if not options.keys() <= inspect.signature(model.loss).parameters.keys():
            raise ConfigError(
                f"label_smoothing_factor is {label_smoothing}, but {type(model).__name__}.loss has "
                "no argument label_smoothing: leave it at 0, or give it one"
            )
        return lambda batch: _own_loss(model, batch, **options)
    return lambda batch: next_token_loss(logits_of(model, batch), batch.labels, label_smoothing)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """What the model returns for a batch in rows, as `batch_loss` says: logits [B, S, V]."""
    taken = inspect.signature(model.forward).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    extra = {}
    if batch.position_ids is not None:  # rows of packs
        # transformers adds such a mask to the scores: 0, or so low that nothing is left
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        mask = batch.attention_mask.logical_not().to(dtype) * torch.finfo(dtype).min
        extra = {"attention_mask": mask, "position_ids": batch.position_ids}
    elif "attention_mask" in taken or any_name:
        extra = {"attention_mask": batch.attention_mask}
    output = model(batch.input_ids, **extra)
    return getattr(output, "logits", output)


def next_token_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum of -log softmax(logits[b, s - 1])[labels[b, s]] over labels but -100.

    logits [B, S, V], labels [B, S]; computed in float32, or float64 if the logits are.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != labels.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ShapeError(
            f"the model must return logits [B, S, V] (or .logits) for input_ids of shape "
            f"{tuple(labels.shape)}; got {got}"
        )
    rows, places = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)
    chosen = logits[rows, places]  # [T, V]
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    wanted = labels[rows, places + 1]
    return F.cross_entropy(chosen, wanted, reduction="sum", label_smoothing=label_smoothing)


def takes_copies(model: nn.Module) -> bool:
    """Whether the loss of each copy of a repeated batch can be had in one forward."""
    return not packs(model) or "copies" in inspect.signature(model.loss).parameters


def losses_of_copies(model: nn.Module, batch: Batch, copies: int) -> Tensor:
    """The loss of each copy, as `batch_loss` has it, of a batch repeated that often: [copies]."""
    if packs(model):
        return _own_loss(model, batch, copies=copies)
    parts = zip(logits_of(model, batch).chunk(copies), batch.labels.chunk(copies), strict=True)
    return torch.stack([next_token_loss(logits, labels) for logits, labels in parts])


def _own_loss(model: nn.Module, batch: Batch, **options: float) -> Tensor:
    """The model's own `loss` of a batch."""
    return model.loss(
        batch.input_ids,
        batch.labels,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        **options,
    )


def compiled(batch_loss: BatchLoss, backend: str | None) -> BatchLoss:
    """`batch_loss` through torch.compile, sizes left open; one graph for each number of examples.

    No backend: torch's own. ConfigError for one that torch does not know.
    """
    return torch.compile(batch_loss, dynamic=True, backend=backend_of(backend))


def backend_of(backend: str | None) -> str:
    """The backend of torch.compile; ConfigError for one that torch does not know."""
    backend = backend or "inductor"
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(
            f"torch_compile_backend must be one of {', '.join(known)}; got {backend!r}"
        )
    return backend
