"""A new adapter out of those that a model has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowrank.adapters import checks, combine
from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, WeightError
from lowrank.nn.adapted import AdaptedLayer, check_name
from lowrank.nn.adapted_module import AdaptedModule
from lowrank.nn.lora_conv import LoRAConv
from lowrank.nn.lora_experts import LoRAExperts

from .inject import attach
from .targets import (
    adapted_layers,
    adapted_modules,
    adapter_names,
    check_adapters,
    condense,
    named_bases,
)

_LEAST_GAIN = 1e-6


@torch.no_grad()
def combine_adapters(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    into: str,
    method: str = "linear",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
) -> nn.Module:
    """Add an idle adapter `into`, the weighted sum of others Σ wᵢ ΔWᵢ; returns the model.

    Scales are part of ΔW as they are now, `scale_adapter` included; the new adapter's is 1. A layer
    that an adapter is not on takes nothing from it. Adapters of every method and rank combine:

    - "linear", "cat": exactly; the ranks add up, in "linear" to no more than min(N, K).
    - "svd": the nearest sum of rank `svd_rank` (None: the largest of the adapters'), or exactly,
      where that is enough.
    - "magnitude_prune", "dare_linear": A and B of each are pruned to a share `density` of their
      elements, the largest or any, which DARE makes up for; then "cat".
    - "ties", "dare_ties": the ΔW are pruned so, and where they differ in sign the majority is
      averaged ("total": by sum, "frequency": by count); then "svd".
    - with "_svd" at the end: the ΔW themselves are pruned; then "svd".

    With an adapter that has a magnitude (DoRA) among them, the new one has one too. `seed` is for
    DARE. Raises TargetError for unknown names, ConfigError for other options, WeightError for NaN;
    the model is then as it was.
    """
    layers = _check(model, adapters, weights, into)
    _check_options(method, svd_rank, density, majority_sign_method, seed)
    used = [(name, a) for name, layer in layers.items() for a in adapters if a in layer.config]
    rank = svd_rank or max(layers[name].r[a] for name, a in used)
    generator = torch.Generator().manual_seed(seed)
    options = (method, rank, 1.0 if density is None else density, majority_sign_method, generator)
    pairs = list(zip(adapters, weights, strict=True))
    found = {name: _combined(name, layer, pairs, options) for name, layer in layers.items()}
    has_magnitude = any(a in layers[name].magnitudes for name, a in used)
    bases = named_bases(model)  # what lies within one of them gets adapters with it
    ranks = {name: r for name, (*_, r) in found.items() if name in bases}
    config = _config(model, layers, adapters, ranks)
    if has_magnitude:
        config = replace(config, method="dora")

    attach(model, ranks, config, into)
    for name, (G, A, B, _) in found.items():
        layer = model.get_submodule(name)
        tensors = layer.tensors(into)
        tensors["lora_A"].copy_(A)
        tensors["lora_B"].copy_(B if G is None else B / G[:, None])
        if has_magnitude:
            layer.start_magnitude(into)
        if G is not None:
            tensors[layer.magnitudes[into]].mul_(G)
    return model


def _combined(
    name: str, layer: AdaptedLayer, pairs: list[tuple[str, float]], options: tuple
) -> tuple[Tensor | None, Tensor, Tensor, int]:
    """(G [N], A, B, rank) with Σ wᵢ ΔWᵢ = (G - 1) ∘ W + B A; G None for 1, A and B as the layer
    holds them.
    """
    G, terms = None, []
    for adapter, w in pairs:
        if adapter in layer.config:
            blocks, g = _blocks(name, layer, adapter), layer.gain(adapter)
            if not all(bool(A.isfinite().all() and B.isfinite().all()) for A, B in blocks):
                raise WeightError(
                    f"{name}: expected finite values in adapter {adapter!r}; got NaN or inf"
                )
            if g is not None:
                G = 1 + w * (g - 1) if G is None else G + w * (g - 1)
                gains = g.chunk(len(blocks))
                blocks = [(A, h[:, None] * B) for (A, B), h in zip(blocks, gains, strict=True)]
            terms.append([(A, B, layer.scaling[adapter], w) for A, B in blocks])
    if G is not None and not bool((G.abs() > _LEAST_GAIN).all()):
        raise ConfigError(
            f"weights: expected such as leave each row of {name} a magnitude; got "
            f"{[w for _, w in pairs]}, which leave one none"
        )
    method, rank, *others = options
    is_experts = isinstance(layer, LoRAExperts)
    share = rank if is_experts else max(1, rank // len(terms[0]))
    parts = [combine.combine(block, method, share, *others) for block in zip(*terms, strict=True)]
    if is_experts:
        A, B = (torch.stack(factors) for factors in zip(*parts, strict=True))
        return G, A.flatten(0, 1), B.permute(1, 2, 0).flatten(1), A.shape[1]
    A, B = (torch.cat(factors) for factors in zip(*parts, strict=True))
    return G, A, B, len(A)


def _blocks(name: str, layer: AdaptedLayer, adapter: str) -> list[tuple[Tensor, Tensor]]:
    """(A, B) of each matrix that the layer's is made of: one, or one for each group or expert."""
    A, B = layer.factors(adapter)
    if isinstance(layer, LoRAExperts):
        return list(zip(A, B, strict=True))
    if isinstance(layer, LoRAConv):
        groups = layer.unmerged_base.groups
        rows = zip(A.chunk(groups), B.chunk(groups), strict=True)
        return [(A, B.chunk(groups, 1)[i]) for i, (A, B) in enumerate(rows)]
    if len(A) != layer.r[adapter]:
        raise ConfigError(
            f"combine_adapters: expected layers of one matrix; {name} is a {type(layer).__name__} "
            "of several; use adapters that are not on it"
        )
    return [(A, B)]


def _config(
    model: nn.Module, layers: dict[str, AdaptedLayer], adapters: list[str], ranks: dict[str, int]
) -> LoRAConfig:
    """Rank and alpha of each layer alike, so that s = 1; the rest as the first adapter has it."""
    configs = [layer.config[a] for a in adapters for layer in layers.values() if a in layer.config]
    (r, _), first = Counter(ranks.values()).most_common(1)[0], configs[0]
    others = checks.exact_patterns({name: rank for name, rank in ranks.items() if rank != r})
    experts = [name for name in ranks if isinstance(layers[name], LoRAExperts)]
    modules = [name for name in ranks if name not in experts]
    return LoRAConfig(
        r=r,
        lora_alpha=r,
        target_modules=condense(model, modules),
        target_parameters=experts or None,
        lora_dropout=0.0 if experts else first.lora_dropout,
        rank_pattern=others,
        alpha_pattern=others,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        inference_mode=all(config.inference_mode for config in configs),
    )


def _check(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float], into: str
) -> dict[str, AdaptedLayer]:
    """The layers that the adapters are on."""
    if isinstance(adapters, str) or not adapters or len(set(adapters)) != len(adapters):
        raise ConfigError(f"adapters: expected names, each once; got {adapters!r}")
    check_adapters(model, adapters)
    sized = isinstance(weights, Sized) and not isinstance(weights, str)
    if not sized or len(weights) != len(adapters):
        raise ConfigError(
            f"weights: expected one for each of {len(adapters)} adapters; got {weights!r}"
        )
    for adapter, weight in zip(adapters, weights, strict=True):
        checks.number(f"weights of {adapter!r}", weight)
    check_name(into)
    if into in adapter_names(model):
        raise ConfigError(
            f"into: {into!r} is already in the model; delete it first or choose another name"
        )
    layers = adapted_layers(model)
    if any(layer.merged for layer in layers.values()):
        raise ConfigError(
            "combine_adapters: expected unmerged layers; the adapters are merged: call unmerge "
            "first"
        )
    for name, module in adapted_modules(model).items():
        if isinstance(module, AdaptedModule) and any(a in module.config for a in adapters):
            raise ConfigError(
                f"adapters: expected such as add to weights; {name} is replaced by one of them "
                "(modules_to_save or trainable_token_indices), and replacements have no sum"
            )
    return {n: layer for n, layer in layers.items() if any(a in layer.config for a in adapters)}


def _check_options(
    method: str, svd_rank: int | None, density: float | None, sign_method: str, seed: int
) -> None:
    checks.choice("method", method, combine.METHODS)
    checks.choice("majority_sign_method", sign_method, combine.SIGN_METHODS)
    if svd_rank is not None:
        checks.rank("svd_rank", svd_rank)
        if method not in combine.WITH_RANK:
            raise ConfigError(
                f"svd_rank: expected None, method={method!r} decides on the rank; got {svd_rank}"
            )
    if (density is not None) != (method in combine.WITH_DENSITY):
        wanted = "a share in (0, 1]" if method in combine.WITH_DENSITY else "None"
        raise ConfigError(f"density: expected {wanted} with method={method!r}; got {density!r}")
    if density is not None:
        checks.number("density", density)
        if not 0 < density <= 1:
            raise ConfigError(f"density: expected a share in (0, 1]; got {density!r}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ConfigError(f"seed: expected an integer of at least 0; got {seed!r}")
