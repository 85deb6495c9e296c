"""Start the adapters of a model from data: EVA, over the inputs of its layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.eva import Components, distribute
from lowrank.errors import ConfigError, DataError
from lowrank.nn.lora_linear import LoRALinear

from .inject import activate, replace_modules
from .switch import disable_adapters
from .targets import adapted_layers, check_adapters, condense

Batch = Tensor | Mapping[str, Any]


def call(model: nn.Module, batch: Batch) -> None:
    """model(batch), or model(**batch) without its labels."""
    if isinstance(batch, Mapping):
        model(**{name: value for name, value in batch.items() if name != "labels"})
    else:
        model(batch)


@torch.no_grad()
def initialize_eva(
    model: nn.Module,
    batches: Iterable[Batch],
    adapter: str = "default",
    forward: Callable[[nn.Module, Batch], Any] = call,
) -> nn.Module:
    """Start an adapter with init_lora_weights="eva" from `batches`, in place.

    Each row of A becomes a direction in which the input of its layer varies, the principal
    components of what `batches` make of it, and B is zero. The ranks are shared out anew: of all
    components of all layers, as many as the ranks add up to, those that explain most. A layer whose
    components are not among them loses its adapter. The config's `eva_config` says

    - rho: no layer gets more than that many times its rank;
    - tau: `batches` is left when from one to the next the cosines of all components exceed it;
    - use_label_mask, label_mask_value: a batch's `labels` say which tokens count; so does its
      `attention_mask`;
    - whiten: divide each row of A by the root of its singular value;
    - adjust_scaling_factors: alpha follows the rank, so that s stays.

    Of a batch that is a mapping, all but `labels` goes to the model, or what `forward` does with
    it. Only linear layers take part. Memory: rho · r directions for each distinct input.

    Returns the model. Raises ConfigError, and DataError if `batches` is empty, before any change.
    """
    check_adapters(model, [adapter])
    every = {n: layer for n, layer in adapted_layers(model).items() if adapter in layer.config}
    layers = {n: layer for n, layer in every.items() if isinstance(layer, LoRALinear)}
    config = next(iter(every.values())).config[adapter]
    if config.init_lora_weights != "eva":
        raise ConfigError(
            f'init_lora_weights: expected "eva" of adapter {adapter!r}; '
            f"got {config.init_lora_weights!r}"
        )
    for name, layer in every.items():
        if layer.merged or "lora_A" not in layer.tensors(adapter):
            what = "merged" if layer.merged else f"a {layer.config[adapter].method} adapter"
            raise ConfigError(f"initialize_eva: expected unmerged LoRA layers; {name} is {what}")
    if not isinstance(batches, Iterable):
        raise DataError(f"batches: expected some, in a list or a loader; got {batches!r}")
    inputs = Inputs(layers, adapter, config.eva_config)
    training = [(module, module.training) for module in model.modules()]
    hooks = [layer.register_forward_pre_hook(inputs.look) for layer in layers.values()]
    try:
        with disable_adapters(model):
            model.eval()
            for batch in batches:
                inputs.choose(batch)
                forward(model, batch)
                if inputs.are_settled():
                    break
    finally:
        for hook in hooks:
            hook.remove()
        for module, flag in training:
            module.training = flag
    if not inputs.components:
        raise DataError("batches: expected at least one that reaches a linear layer; got none")
    _restart(model, layers, adapter, inputs)
    return model


class Inputs:
    """The principal components of what layers are called with, found once for the same inputs."""

    def __init__(
        self, layers: Mapping[str, LoRALinear], adapter: str, options: Mapping[str, Any]
    ) -> None:
        self.components: dict[str, Components] = {}  # of the first layer with an input
        self.options = options
        self._rank = {name: layer.r[adapter] for name, layer in layers.items()}
        self._name = {layer: name for name, layer in layers.items()}
        self._first: dict[str, str] = {}  # of each layer, the first one with the same input
        self._seen: dict[tuple, str] = {}
        self._mask: Tensor | None = None
        self._before: dict[str, Tensor] = {}

    def choose(self, batch: Batch) -> None:
        """Before a batch: which of its tokens count."""
        self._mask = None
        if isinstance(batch, Mapping):
            if isinstance(batch.get("attention_mask"), Tensor):
                self._mask = batch["attention_mask"].bool()
            if self.options["use_label_mask"] and isinstance(batch.get("labels"), Tensor):
                counts = batch["labels"] != self.options["label_mask_value"]
                self._mask = counts if self._mask is None else self._mask & counts

    def look(self, layer: LoRALinear, args: tuple) -> None:
        """Called before a layer is: with its input [..., K]."""
        name, x = self._name[layer], args[0].detach()
        if self._mask is not None and self._mask.shape == x.shape[:-1]:
            x = x[self._mask.to(x.device)]
        x = x.reshape(-1, x.shape[-1])
        if not len(x):
            return
        if name not in self._first:
            self._first[name] = self._seen.setdefault(_fingerprint(x), name)
        if self._first[name] == name:
            if name not in self.components:
                most = round(self.options["rho"] * max(self._rank.values()))
                self.components[name] = Components(min(most, x.shape[1]))
            self.components[name].update(x)

    def are_settled(self) -> bool:
        """After a batch: whether it has hardly turned the components that are to be used."""
        if not self.components:
            return False
        ranks, settled = self.ranks(), True
        for first, found in self.components.items():
            used = max(ranks[name] for name, of in self._first.items() if of == first)
            now, before = found.vectors, self._before.get(first)
            self._before[first] = now
            if before is None or len(before) < used:
                settled = False
            else:
                cosines = (now[:used] * before[:used]).sum(1).abs()
                settled = settled and bool((cosines >= self.options["tau"]).all())
        return settled

    def ranks(self) -> dict[str, int]:
        """The new rank of each layer that has been called."""
        most: dict[str, int] = {}
        for name, first in self._first.items():
            most[first] = max(most.get(first, 0), round(self.options["rho"] * self._rank[name]))
        shares = {
            name: self.components[first].explained[: most[first]].cpu()
            for name, first in self._first.items()
            if first in self.components
        }
        return distribute(shares, sum(self._rank[name] for name in shares))

    def rows(self, name: str, r: int) -> Tensor:
        """A [r, K] of a layer."""
        found = self.components[self._first[name]]
        rows = found.vectors[:r]
        return rows / found.singular_values[:r, None].sqrt() if self.options["whiten"] else rows


def _restart(
    model: nn.Module, layers: Mapping[str, LoRALinear], adapter: str, inputs: Inputs
) -> None:
    ranks = inputs.ranks()
    kept = [n for n, layer in adapted_layers(model).items() if adapter in layer.config]
    kept = [name for name in kept if ranks.get(name, 1)]
    first = next(iter(layers.values())).config[adapter]
    config = replace(first, target_modules=condense(model, kept))
    bare: dict[nn.Module, nn.Module] = {}
    active = next(iter(layers.values())).active_adapters
    for name, r in ranks.items():
        layer, alpha = layers[name], layers[name].lora_alpha[adapter]
        if config.eva_config["adjust_scaling_factors"]:
            alpha *= r / layer.r[adapter]
        layer.delete_adapter(adapter)
        if r == 0:
            if not layer.config:
                bare[layer] = layer.base_layer
            continue
        own = replace(
            config,
            rank_pattern={f"^{re.escape(name)}": r},
            alpha_pattern={f"^{re.escape(name)}": alpha},
        )
        layer.add_adapter(adapter, own, name)
        A, B = (layer.tensors(adapter)[part] for part in ("lora_A", "lora_B"))
        A.copy_(inputs.rows(name, r))
        B.zero_()
        layer.config[adapter] = config
    for layer in adapted_layers(model).values():
        if adapter in layer.config:
            layer.config[adapter] = config
    replace_modules(model, bare)
    activate(model, active)


def _fingerprint(x: Tensor) -> tuple:
    """The same for the same numbers, and hardly for others."""
    wide = x.double().flatten()
    weights = torch.arange(1, wide.numel() + 1, dtype=wide.dtype, device=wide.device).cos()
    return tuple(x.shape), wide.sum().item(), (wide @ weights).item()
