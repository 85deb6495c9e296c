"""What stands around a base layer, and may be merged into it and taken out again."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


class WithBase(nn.Module):
    """A frozen `base_layer` with adapters.

    While merged, `base_layer` is another, plain one, and the one that was there is kept aside, so
    that unmerging gives back its very bits.
    """

    base_layer: nn.Module
    active_adapters: list[str]
    disabled: bool
    # in a tuple, so that it is no submodule: a merged layer's state is the merged one alone
    _aside: tuple[nn.Module, ...] = ()

    @property
    def merged(self) -> bool:
        """Whether `base_layer` is what the adapters have made of it."""
        return bool(self._aside)

    @property
    def unmerged_base(self) -> nn.Module:
        """The base layer as it is without any adapter, merged or not."""
        return self._aside[0] if self._aside else self._modules["base_layer"]

    def stand_in(self, merged: nn.Module) -> None:
        """Let `merged` be the base until `unmerge`."""
        if merged.training != self.training:
            merged.train(self.training)
        self._aside, self._modules["base_layer"] = (self._modules["base_layer"],), merged

    def unmerge(self) -> None:
        """Put the base layer back as it was before `merge`, bit for bit."""
        if self._aside:
            self._modules["base_layer"], self._aside = self._aside[0], ()

    def _apply(self, fn: Callable, recurse: bool = True) -> WithBase:
        for base in self._aside:
            base._apply(fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        state = "merged" if self.merged else "disabled" if self.disabled else "active"
        return f"{state}={self.active_adapters}"


def parameters_of(base: nn.Module) -> list[nn.Parameter]:
    """`base.parameters()`; of a layer that is not made of others, in a tenth of the time."""
    if base._modules:
        return list(base.parameters())
    return [parameter for parameter in base._parameters.values() if parameter is not None]
