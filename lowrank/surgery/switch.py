"""Choose among the adapters of a model: activate, scale, disable, delete."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from torch import nn

from lowrank.adapters import checks
from lowrank.errors import ConfigError
from lowrank.nn.adapted import AdaptedLayer

from .inject import activate
from .start import check_may_go
from .targets import adapted_layers, adapted_modules, check_adapters


def set_adapter(model: nn.Module, adapters: str | Iterable[str]) -> None:
    """Make one adapter, or the sum of several, active; only the active ones train."""
    adapters = check_adapters(model, [adapters] if isinstance(adapters, str) else adapters)
    _unmerged_layers(model, "set_adapter")
    activate(model, adapters)


def delete_adapter(model: nn.Module, adapter: str) -> None:
    """Remove an adapter from the model; the other active ones stay active.

    Raises ConfigError for one that has the principal part of the weights, which would be lost.
    """
    check_adapters(model, [adapter])
    layers = list(_unmerged_layers(model, "delete_adapter"))
    for layer in layers:
        if adapter in layer.config:
            check_may_go(adapter, layer.config[adapter], "delete_adapter")
    for layer in adapted_modules(model).values():
        layer.delete_adapter(adapter)


def scale_adapter(model: nn.Module, adapter: str, factor: float) -> None:
    """Scale an adapter to `factor` times what its config says; never cumulative, 1.0 undoes it."""
    checks.number("factor", factor)
    check_adapters(model, [adapter])
    for layer in _unmerged_layers(model, "scale_adapter"):
        if adapter in layer.scaling:
            layer.scale_adapter(adapter, factor)


def disable_adapters(model: nn.Module) -> Disabled:
    """Let the base model speak alone, merged or not: from now on, or within a `with`.

    Biases that an adapter trained are part of the base and stay.
    """
    return Disabled(adapted_modules(model).values())


def enable_adapters(model: nn.Module) -> None:
    """Undo `disable_adapters`."""
    for layer in adapted_modules(model).values():
        layer.disabled = False


class Disabled:
    """Adapters disabled on creation; leaving the `with` block restores what was before."""

    def __init__(self, layers: Iterable[AdaptedLayer]) -> None:
        self._before = [(layer, layer.disabled) for layer in layers]
        for layer, _ in self._before:
            layer.disabled = True

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for layer, disabled in self._before:
            layer.disabled = disabled


def _unmerged_layers(model: nn.Module, what: str) -> list[AdaptedLayer]:
    layers = list(adapted_layers(model).values())
    if any(layer.merged for layer in layers):
        raise ConfigError(
            f"{what}: expected unmerged layers; the adapters are merged: call unmerge first"
        )
    return layers
