"""Weights of experts that are parameters, not modules: which there are, which a config means."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lowrank.errors import TargetError
from lowrank.nn.kinds import kind_of
from lowrank.nn.lora_experts import DenseExperts, LoRAExperts
from lowrank.nn.quant_experts import QuantExperts, is_transposed


def expert_parameters(modules: Mapping[str, nn.Module]) -> dict[str, DenseExperts]:
    """The parameters [E, N, K] of these modules by name, each in a base for adapters."""
    return {
        f"{name}.{leaf}" if name else leaf: DenseExperts(weight, is_transposed(module))
        for name, module in modules.items()
        for leaf, weight in module._parameters.items()
        if weight is not None and weight.dim() == 3 and weight.is_floating_point()
        if kind_of(module) is None and not isinstance(module, DenseExperts)
    }


def find_parameters(model: nn.Module, wanted: list[str]) -> list[str]:
    """The names of weights of experts that `target_parameters` means, in the model's order.

    Those that are quantized or have adapters already are modules by now. Raises TargetError at the
    first entry that matches none.
    """
    if not wanted:
        return []
    there = _all_of(model)
    for entry in wanted:
        if not any(_is_meant(name, entry) for name in there):
            raise TargetError(
                f"target_parameters: {entry!r} matches no weight [E, N, K] of experts; the model "
                f"has {', '.join(ends_of_parameters(model)) or 'none'}; layers are for "
                "target_modules"
            )
    return [name for name in there if any(_is_meant(name, entry) for entry in wanted)]


def ends_of_parameters(model: nn.Module) -> list[str]:
    """What the weights of experts in the model are called in `target_parameters`."""
    return sorted({".".join(name.split(".")[-2:]) for name in _all_of(model)})


def _all_of(model: nn.Module) -> list[str]:
    kinds = (QuantExperts, LoRAExperts)
    modules = dict(model.named_modules())
    there = [name for name, module in modules.items() if isinstance(module, kinds)]
    return [n for n in there if not n.endswith(".base_layer")] + list(expert_parameters(modules))


def _is_meant(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")
