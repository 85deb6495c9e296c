"""What an adapter replaces rather than adds to: a whole module, or some rows of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError
from lowrank.nn.with_base import WithBase


class AdaptedModule(WithBase):
    """A frozen `base_layer`, and for each of its adapters what is said in its place.

    It is switched, disabled, merged and unmerged as layers with adapters are (AdaptedLayer). Of
    the active adapters one at most may speak: two replacements have no sum. While merged,
    `base_layer` is plain and says what that one says.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.config: dict[str, LoRAConfig] = {}
        self.active_adapters: list[str] = []
        self.disabled = False
        self.register_load_state_dict_pre_hook(_take_plain_keys)

    def to_file(self, adapter: str) -> dict[str, Tensor]:
        """What the adapter has here, by its keys in PEFT's files, from the module's name on."""
        raise NotImplementedError

    @torch.no_grad()
    def from_file(self, adapter: str, tensors: Mapping[str, Tensor]) -> None:
        """Fill the adapter with what `to_file` gives; `tensors` may have more."""
        for key, tensor in self.to_file(adapter).items():
            tensor.copy_(tensors[key])

    def trained(self, adapter: str) -> list[nn.Parameter]:
        """The parameters of one adapter."""
        raise NotImplementedError

    def replaced(self, adapter: str) -> nn.Module:
        """A plain module that says what this one says with the adapter."""
        raise NotImplementedError

    def forget(self, adapter: str) -> None:
        """Drop what the adapter has here."""
        raise NotImplementedError

    @property
    def speaker(self) -> str | None:
        """The adapter that speaks; None: the base does."""
        if self.disabled or self.merged or not self.active_adapters:
            return None
        return self.active_adapters[0]

    def check_active(self, adapters: Iterable[str]) -> None:
        """Raises ConfigError if these cannot be active together."""
        several = [a for a in adapters if a in self.config]
        if len(several) > 1:
            raise ConfigError(
                f"adapters {', '.join(map(repr, several))}: expected one at most of those that "
                f"replace a {type(self.unmerged_base).__name__}, as they have no sum; name one"
            )

    def set_adapter(self, adapters: Iterable[str]) -> None:
        """Make these, as far as they are here, active; only what is active trains."""
        adapters = list(adapters)
        self.check_active(adapters)
        self.active_adapters = [a for a in adapters if a in self.config]
        self.base_layer.requires_grad_(False)  # its bias too, which bias="all" would train
        for adapter, config in self.config.items():
            trains = adapter in self.active_adapters and not config.inference_mode
            for parameter in self.trained(adapter):
                parameter.requires_grad_(trains and parameter.is_floating_point())

    def delete_adapter(self, adapter: str) -> None:
        """Forget an adapter, if it is here."""
        if adapter in self.config:
            self.forget(adapter)
            del self.config[adapter]
            self.active_adapters = [a for a in self.active_adapters if a != adapter]

    def merge(
        self, adapters: Iterable[str] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Let `base_layer` be what the adapter (None: the active one) says, the old one kept aside.

        `dtype` belongs to the matrices of other layers; here nothing is rounded.
        """
        chosen = list(self.active_adapters if adapters is None else adapters)
        self.check_active(chosen)
        new = (self.replaced(adapter) for adapter in chosen if adapter in self.config)
        self.stand_in(next(new, self.base_layer))

    def check_new(self, adapter: str) -> None:
        """Raises ConfigError unless an adapter of that name can be added."""
        if adapter in self.config:
            raise ConfigError(
                f"adapter: {adapter!r} is already there; delete it first or choose another name"
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # code written for the base asks for its weight, its sizes
            if "base_layer" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.base_layer, name)


def _take_plain_keys(module: AdaptedModule, state_dict: dict, prefix: str, *_: object) -> None:
    """Before loading: a plain module's keys go to `base_layer`, the adapters stay as they are."""
    plain = [
        key
        for key in state_dict
        if key.startswith(prefix) and key[len(prefix) :].split(".")[0] not in module._modules
    ]
    for key in plain:
        state_dict[f"{prefix}base_layer.{key[len(prefix) :]}"] = state_dict.pop(key)
    if plain:
        for name, value in module.state_dict().items():
            if not name.startswith("base_layer."):
                state_dict.setdefault(prefix + name, value)
