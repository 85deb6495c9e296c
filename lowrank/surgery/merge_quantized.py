"""Fold adapters into quantized weights, and tell how much of them is left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank.adapters import svd
from lowrank.adapters.config import LoRAConfig
from lowrank.errors import ConfigError, WeightError
from lowrank.nn.adapted import AdaptedLayer, check_name
from lowrank.nn.lora_linear import LoRALinear
from lowrank.nn.quant_linear import QuantLinear
from lowrank.progress import bar
from lowrank.quant import refit

from .inject import activate, replace_modules
from .merge import layers_to_merge, merge_and_unload
from .targets import adapted_modules
from .tied import tied_modules, twins_of

_NITER = 4  # power iterations of the SVD of what the codes could not take


@dataclass(frozen=True)
class Change:
    """A change C of a weight that was made in place of ΔW."""

    share: float  # <C, ΔW> / <ΔW, ΔW>: 1 is all of it, 0 nothing
    error: float  # |C - ΔW| / |ΔW|


@dataclass(frozen=True)
class MergedLayer:
    """How one layer's quantized weight took its ΔW."""

    name: str
    size: float  # |ΔW|²
    rounded: Change  # by quantizing anew, which is not what was done
    refitted: Change  # by scales and codes refitted to W + ΔW, without an adapter
    kept: Change  # as the layer now is
    rank: int  # of its residual adapter, 0 for none


@dataclass(frozen=True)
class MergeReport:
    """What `merge_quantized` did, layer by layer; printed, a table of the whole."""

    layers: tuple[MergedLayer, ...]
    residual: str | None  # name of the adapter that has what the codes could not take

    @property
    def rounded(self) -> Change:
        """Of all layers together, by quantizing anew."""
        return self._whole("rounded")

    @property
    def refitted(self) -> Change:
        """Of all layers together, by refitted scales and codes."""
        return self._whole("refitted")

    @property
    def kept(self) -> Change:
        """Of all layers together, as they now are."""
        return self._whole("kept")

    def _whole(self, field: str) -> Change:
        parts = [(layer.size, getattr(layer, field)) for layer in self.layers]
        total = sum(size for size, _ in parts)
        if not total:
            return Change(1.0, 0.0)
        share = sum(size * change.share for size, change in parts) / total
        return Change(share, math.sqrt(sum(n * c.error**2 for n, c in parts) / total))

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda layer: layer.kept.error)
        ranks = sorted({layer.rank for layer in self.layers})
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        how = f", adapter {self.residual!r} of rank {rank} with the rest" if self.residual else ""
        lines = [
            (self.rounded, "quantized anew, which loses what is less than half a step"),
            (self.refitted, "scales and codes refitted"),
            (self.kept, f"as it now is{how}"),
            (worst.kept, f"its worst layer, {worst.name}"),
        ]
        head = f"the change ΔW that {len(self.layers)} quantized layers were to take\n"
        return f"{head}   share   error" + "".join(
            f"\n{change.share:8.2%}{change.error:8.2%}  {what}" for change, what in lines
        )


@torch.no_grad()
def merge_quantized(
    model: nn.Module,
    adapters: Iterable[str] | None = None,
    residual_rank: int | None = None,
    into: str = "default",
) -> MergeReport:
    """Fold adapters (None: the active ones) into weights that stay quantized, in place, for good.

    A change is mostly smaller than half a step of the codes, so that quantizing W + ΔW anew loses
    nearly all of it. Here scales and codes are refitted to W + ΔW, and what they cannot take is the
    residual adapter `into`: its nearest matrix of `residual_rank` (None: half the ranks that were
    merged; 0: no adapter is left). Of the ways found, each layer takes that of least error.

    Layers that are not quantized are merged as by `merge_and_unload`. Returns what each layer
    holds. Raises ConfigError without a quantized layer, WeightError if a merged weight is not
    finite, the model then as it was. One weight at a time is made dense.
    """
    if residual_rank is not None and (type(residual_rank) is not int or residual_rank < 0):
        raise ConfigError(f"residual_rank: expected None or at least 0; got {residual_rank!r}")
    check_name(into)
    layers, adapters = layers_to_merge(model, adapters, "merge_quantized")
    layers = {n: m for n, m in layers.items() if isinstance(m, AdaptedLayer)}
    quantized = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, LoRALinear) and isinstance(layer.base_layer, QuantLinear)
    }
    if not quantized:
        raise ConfigError(
            "merge_quantized: expected adapters over quantized linear layers; the model has none: "
            "merge_and_unload is for dense ones"
        )
    groups = tied_modules(model)
    for name in quantized:
        if twins := twins_of(name, groups):
            raise ConfigError(
                f"{name}: shares its codes with {twins[0]}, which would change too; "
                "merge_and_unload, or train it with the head among exclude_modules"
            )
    for name, layer in bar("checking", quantized.items(), len(quantized)):
        _merged(name, layer, adapters)
    rows, factors = [], {}
    for name, layer in bar("merging", quantized.items(), len(quantized)):
        r = _rank(layer, adapters) if residual_rank is None else residual_rank
        row, factors[name] = _requantize(name, layer, _merged(name, layer, adapters), r)
        rows.append(row)
    config = _config(model, layers, rows)
    replace_modules(model, {layer: layer.base_layer for layer in quantized.values()})
    if adapted_modules(model):
        merge_and_unload(model, adapters)
    if config is not None:
        _attach(model, factors, config, into)
    return MergeReport(tuple(rows), None if config is None else into)


def _merged(name: str, layer: AdaptedLayer, adapters: list[str] | None) -> Tensor:
    """W + ΔW [N, K] in float32. Raises WeightError with the layer's name."""
    try:
        return layer.merged_matrix(adapters, torch.float32)
    except WeightError as error:
        raise WeightError(f"{name}: {error}") from error


def _rank(layer: AdaptedLayer, adapters: list[str] | None) -> int:
    chosen = layer.active_adapters if adapters is None else adapters
    return sum(layer.r[a] for a in chosen if a in layer.r) // 2


def _requantize(
    name: str, layer: AdaptedLayer, target: Tensor, r: int
) -> tuple[MergedLayer, tuple[Tensor, Tensor]]:
    """Refill the base with what, with a residual of rank r, is nearest to `target` [N, K].

    Returns what that holds, and the residual's A [r, K] and B [N, r].
    """
    base: QuantLinear = layer.base_layer
    quantizer, before = base.quantizer, base.dequantize(torch.float32)
    delta = target - before
    size = delta.square().sum().item()
    floor = torch.finfo(torch.float32).eps * target.norm().item()

    def change(weight: Tensor) -> Change:
        if not size:
            return Change(1.0, 0.0)
        made = weight - before
        lost = (made - delta).norm().item() / math.sqrt(size)
        return Change((made * delta).sum().item() / size, lost)

    def rest(weight: Tensor) -> tuple[Tensor, Tensor]:
        if r == 0:
            return weight.new_zeros(0, weight.shape[1]), weight.new_zeros(weight.shape[0], 0)
        return svd.factors(target - weight, r, 1.0, floor, _NITER)

    rounded = change(quantizer.dequantize(quantizer.quantize(target), torch.float32))
    refitted = refit(quantizer, base.storage, target)
    A, B = rest(before)
    ways = [base.storage, refitted]
    if r:
        ways.append(refit(quantizer, base.storage, target - B @ A))
    best = None
    for storage in ways:
        weight = quantizer.dequantize(storage, torch.float32)
        if storage is refitted:
            alone = change(weight)
        A, B = rest(weight)
        made = change(weight + B @ A)
        if best is None or made.error < best[0].error:
            best = made, storage, A, B
    kept, storage, A, B = best
    base.refill(storage)
    return MergedLayer(name, size, rounded, alone, kept, r), (A, B)


def _config(
    model: nn.Module, layers: dict[str, AdaptedLayer], rows: list[MergedLayer]
) -> LoRAConfig | None:
    """That of the residual adapter, s = 1; None if no layer has a residual."""
    ranks = {row.name: row.rank for row in rows if row.rank}
    if not ranks:
        return None
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: r for name, r in ranks.items() if r != usual}
    merged = next(c for layer in layers.values() for c in layer.config.values())
    return LoRAConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern=others,
        task_type=merged.task_type,
        inference_mode=True,
    )


def _attach(
    model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]], config: LoRAConfig, adapter: str
) -> None:
    modules = dict(model.named_modules())
    wrapped = {}
    for name in config.target_modules:
        layer = LoRALinear.wrap(modules[name], config, adapter, name)
        for parameter, factor in zip(layer.factors(adapter), factors[name], strict=True):
            parameter.copy_(factor)
        wrapped[modules[name]] = layer.train(modules[name].training)
    replace_modules(model, wrapped)
    activate(model, [adapter])
