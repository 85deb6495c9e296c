"""What really flows into each linear layer: some rows of it, gathered by hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import DataError


@torch.no_grad()
def capture(
    model: nn.Module, linears: Mapping[str, nn.Module], inputs: Any, rows: int
) -> dict[str, Tensor]:
    """{name: x [M, K]} with M <= `rows` input rows of each linear that `inputs` reach.

    `inputs` is what the model is called with, a tensor, a tuple of arguments or a mapping of named
    ones, or a list of several such batches. Of each batch the rows are evenly spaced and as many.
    """
    batches = inputs if isinstance(inputs, list) else [inputs]
    if not batches:
        raise DataError("inputs: expected a batch, or a list of batches; got an empty list")
    share = -(-rows // len(batches))
    parts: dict[str, list[Tensor]] = {name: [] for name in linears}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = (args[0] if args else kwargs["input"]).detach()
            x = x.reshape(-1, x.shape[-1])
            room = min(share, rows - sum(map(len, parts[name])), len(x))
            places = torch.arange(room, device=x.device) * len(x) // max(room, 1)
            parts[name].append(x[places])  # a copy

        return hook

    handles = [
        linear.register_forward_pre_hook(keep(name), with_kwargs=True)
        for name, linear in linears.items()
    ]
    try:
        for batch in batches:
            _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(kept) for name, kept in parts.items() if sum(map(len, kept))}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and then each in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple):
        model(*batch)
    else:
        model(batch)
