"""Run batches whose rows have different adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lowrank.errors import ConfigError, TargetError
from lowrank.nn.rows import Rows

from .targets import adapted_modules, check_adapters

BASE = "__base__"  # PEFT's name for none


@contextmanager
def adapter_rows(model: nn.Module, adapters: Sequence[str | None]) -> Iterator[None]:
    """Within a `with`, row i of every batch has the adapter `adapters[i]` alone, None for none.

    In training too: the gradient of a row goes to its adapter, if `set_adapter` has it among those
    that train. Linear layers compute all rows at once; other kinds of layers, and linear ones of
    adapters with a magnitude (DoRA), each adapter's rows in turn. The first dimension of what comes
    to a layer has to be the batch. With checkpointing, the backward pass belongs within, too.

    Raises TargetError for unknown names, and for layers that cannot tell rows apart.
    """
    if isinstance(adapters, str) or not adapters:
        raise ConfigError(f"adapters: expected a name, or None, for each row; got {adapters!r}")
    names = [None if a == BASE else a for a in adapters]
    used = check_adapters(model, [a for a in dict.fromkeys(names) if a is not None])
    layers = []
    for name, layer in adapted_modules(model).items():
        if layer.merged:
            raise ConfigError(
                "adapter_rows: expected unmerged layers; the adapters are merged: call unmerge "
                "first"
            )
        if getattr(layer, "takes_rows", False):
            layers.append(layer)
        elif any(a in layer.config for a in (*used, *layer.active_adapters)):
            raise TargetError(
                f"adapter_rows: {name} is a {type(layer).__name__}, which has one adapter for all "
                "rows; use adapters that are not on it"
            )
    rows, before = Rows(names), [layer.rows for layer in layers]
    try:
        for layer in layers:
            layer.rows = rows
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.rows = was
