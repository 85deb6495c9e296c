"""Embeddings and heads whose weight is one: what an adapter on them keeps so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError
from lowrank.nn.held import Transposed
from lowrank.nn.lora_embedding import LoRAEmbedding
from lowrank.nn.lora_linear import LoRALinear
from lowrank.nn.quant_embedding import QuantEmbedding

from .targets import ADAPTED, adapted_layers, walk

EMBEDDINGS = (nn.Embedding, QuantEmbedding)


def tied_modules(model: nn.Module) -> list[list[str]]:
    """Groups of modules, by name, that share a parameter, one of them an embedding's."""
    holders: dict[int, list[str]] = {}
    tables, seen = set(), set()
    for name, module in walk(model):
        if module in seen:
            continue
        seen.add(module)
        base = module.unmerged_base if isinstance(module, ADAPTED) else module
        for parameter in base._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(name)
                if isinstance(base, EMBEDDINGS):
                    tables.add(id(parameter))
    groups = [tuple(names) for key, names in holders.items() if len(names) > 1 and key in tables]
    return [list(group) for group in dict.fromkeys(groups)]


def twins_of(name: str, groups: list[list[str]]) -> list[str]:
    """The others of the groups that the module is in."""
    return [twin for group in groups if name in group for twin in group if twin != name]


def with_twins(model: nn.Module, names: list[str], config: LoRAConfig) -> list[str]:
    """The targets, and with config.ensure_weight_tying what is tied to them.

    Raises ConfigError for a method whose adapters on both are not one.
    """
    groups = tied_modules(model) if config.ensure_weight_tying else []
    twins = [twin for name in names for twin in twins_of(name, groups)]
    if twins and config.method not in ("lora", "lora_fa"):
        raise ConfigError(
            f"ensure_weight_tying: expected no targets that are tied with method={config.method!r};"
            f" got {twins[0]!r} among them; add it to exclude_modules"
        )
    return list(dict.fromkeys([*names, *twins]))


def tie_adapters(model: nn.Module, names: Iterable[str], adapter: str) -> None:
    """Let heads among the layers of these names have the adapter of the embedding they share.

    Of a head W [V, d] whose embedding has ΔWᵀ = s·B A, A' = Bᵀ and B' = Aᵀ.
    """
    layers, groups = adapted_layers(model), tied_modules(model)
    for name in names:
        for twin in twins_of(name, groups):
            embedding, head = layers[name], layers.get(twin)
            if isinstance(embedding, LoRAEmbedding) and isinstance(head, LoRALinear):
                head.lora_A[adapter] = Transposed(embedding.lora_B[adapter])
                head.lora_B[adapter] = Transposed(embedding.lora_A[adapter])


def tie_merged(
    layers: Mapping[str, nn.Module], groups: list[list[str]], adapters: list[str]
) -> None:
    """After merging these adapters: heads that followed an embedding share its weight again."""
    for group in groups:
        held = [layers[name] for name in group if name in layers]
        for embedding in (layer for layer in held if isinstance(layer, LoRAEmbedding)):
            for head in (layer for layer in held if isinstance(layer, LoRALinear)):
                chosen = [a for a in adapters if a in head.config or a in embedding.config]
                if all(a in head.config and _follows(head, a) for a in chosen):
                    head.base_layer.weight = embedding.base_layer.weight


def _follows(head: LoRALinear, adapter: str) -> bool:
    return isinstance(head.lora_A[adapter], Transposed)
