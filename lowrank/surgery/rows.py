"""Run batches whose rows have different adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from lowrank.errors import ConfigError, TargetError
from lowrank.nn.rows import Copies, Rows

from .targets import adapted_modules, check_adapters

BASE = "__base__"  # PEFT's name for none


def adapter_rows(model: nn.Module, adapters: Sequence[str | None]) -> AbstractContextManager[None]:
    """Within a `with`, row i of every batch has the adapter `adapters[i]` alone, None for none.

    In training too: the gradient of a row goes to its adapter, if `set_adapter` has it among those
    that train. Linear layers compute all rows at once; other kinds of layers, and linear ones of
    adapters with a magnitude (DoRA), each adapter's rows in turn. The first dimension of what comes
    to a layer has to be the batch. With checkpointing, the backward pass belongs within, too.

    Raises TargetError for unknown names, and for layers that cannot tell rows apart.
    """
    return _with_rows(model, adapters, Rows, "adapter_rows")


def adapter_copies(
    model: nn.Module, adapters: Sequence[str | None]
) -> AbstractContextManager[None]:
    """Within a `with`, every batch is one batch repeated, once for each of `adapters`, in order.

    As `adapter_rows`, and for models too whose layers see other shapes than [rows, ...]: what
    comes to them is cut into as many equal parts. Raises what `adapter_rows` raises.
    """
    return _with_rows(model, adapters, Copies, "adapter_copies")


def rows_of(model: nn.Module, B: int) -> list[str | None] | None:
    """The adapter that each of B rows has by now, within a `with` of one of those; else None."""
    layers = adapted_modules(model).values()
    found = [layer.rows for layer in layers if getattr(layer, "takes_rows", False)]
    rows = next(filter(None, found), None)
    if rows is None or B % len(rows.adapters):
        return None
    return [adapter for adapter in rows.adapters for _ in range(B // len(rows.adapters))]


@contextmanager
def _with_rows(
    model: nn.Module, adapters: Sequence[str | None], kind: type[Rows], what: str
) -> Iterator[None]:
    if isinstance(adapters, str) or not adapters:
        raise ConfigError(f"adapters: expected a name, or None, for each row; got {adapters!r}")
    names = [None if a == BASE else a for a in adapters]
    used = check_adapters(model, [a for a in dict.fromkeys(names) if a is not None])
    layers = []
    for name, layer in adapted_modules(model).items():
        if layer.merged:
            raise ConfigError(
                f"{what}: expected unmerged layers; the adapters are merged: call unmerge first"
            )
        if getattr(layer, "takes_rows", False):
            layers.append(layer)
        elif any(a in layer.config for a in (*used, *layer.active_adapters)):
            raise TargetError(
                f"{what}: {name} is a {type(layer).__name__}, which has one adapter for all "
                "rows; use adapters that are not on it"
            )
    rows, before = kind(names), [layer.rows for layer in layers]
    try:
        for layer in layers:
            layer.rows = rows
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.rows = was
