"""A linear layer with a DoRA adapter, beside the same layer frozen and without one.

As `lora_linear`, but that the rows of W + s·B A are rescaled to a magnitude m, which trains too:
each forward needs the norms of those rows anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import Contender, copies_for
from benchmarks.layers import LAYERS
from benchmarks.lora_linear import (
    RANK,
    SCALE,
    Adapter,
    Side,
    compare,
    contender,
    fill,
    with_lowrank,
    with_peft,
)
from benchmarks.probe import Probe
from benchmarks.settings import Settings

_MOST_COPIES = 16  # at 4096x4096, each of peft's over 4 bits comes to 150 MB of memory
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")


@dataclass
class Whole:
    """What a stored weight W and an adapter come to, in float64: V = W + s·B A, its norms, m."""

    V: Tensor
    norms: Tensor
    magnitude: Tensor
    adapter: Adapter

    @classmethod
    def of(cls, weight: Tensor, adapter: Adapter) -> Whole:
        V = weight + SCALE * adapter.B.double() @ adapter.A.double()
        norms = V.norm(dim=1)
        factors = torch.linspace(0.8, 1.2, len(norms), dtype=norms.dtype, device=norms.device)
        return cls(V, norms, (norms * factors).float(), adapter)

    @property
    def gain(self) -> Tensor:
        return self.magnitude.double() / self.norms

    def gradients(self, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        """dA, dB and dm over all rows."""
        x, dz = x.double(), dy.double() * self.gain
        A, B = self.adapter.A.double(), self.adapter.B.double()
        dm = (dy.double() * (x @ self.V.T)).sum(0) / self.norms
        return dict(zip(PARTS, (SCALE * (dz @ B).T @ x, SCALE * dz.T @ (x @ A.T), dm), strict=True))


def run(settings: Settings) -> list[dict]:
    """Cases of every shape, base, dtype, M and direction."""
    return compare(settings, "dora_linear", _sides, _contender)


def _sides(
    settings: Settings, package: str, weight: Tensor, dtype: torch.dtype, adapter: Adapter
) -> list[Side]:
    if package != "lowrank" and package not in settings.against:
        return []
    layer = LAYERS[package](weight, dtype)
    exact = layer.exact()
    probe, whole = Probe.of(exact, dtype), Whole.of(exact, adapter)
    count = min(_MOST_COPIES, copies_for(layer.stored_bytes, settings.working_set))
    bare = f"{package}, frozen"

    def side(name: str, wrap: Callable[[nn.Module], nn.Module]) -> Side:
        modules = [wrap(copy.deepcopy(layer.module)) for _ in range(count)]
        for module in modules:
            fill(module, adapter)
            with torch.no_grad():
                module.lora_magnitude_vector["default"].weight.copy_(whole.magnitude)
        rescaled = replace(
            probe,
            exact_y=probe.x.double() @ whole.V.T * whole.gain,
            exact_dx=probe.dy.double() * whole.gain @ whole.V,
        )
        return Side(name, modules, layer, rescaled, bare, whole.gradients)

    made = [Side(bare, [copy.deepcopy(layer.module) for _ in range(count)], layer, probe, bare)]
    if package in ("torch", "lowrank"):
        made.append(side("lowrank", partial(with_lowrank, use_dora=True)))
    if "peft" in settings.against and package in ("torch", "bitsandbytes"):
        name = "peft" if package == "torch" else "peft + bitsandbytes"
        made.append(side(name, partial(with_peft, use_dora=True)))
    return made


def _contender(side: Side, M: int, backward: bool) -> Contender:
    made, (N, K) = contender(side, M, backward), side.layer.shape
    if not side.adapted:
        return made
    # beyond a LoRA's, the norms: W once more for A Wᵀ
    moved, flops = made.moved + side.layer.stored_bytes, made.flops + 2 * RANK * N * K
    return replace(made, moved=moved, flops=flops)
