"""A linear layer with a DoRA adapter, beside the same layer frozen and without one.

As `lora_linear`, but that the rows of W + s·B A are rescaled to a magnitude m, which trains too:
each forward needs the norms of those rows anew.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.codebook_linear import LIMITS
from benchmarks.harness import Contender, copies_for, relative_error
from benchmarks.layers import LAYERS, Layer
from benchmarks.lora_linear import ALPHA, BASES, RANK, SCALE, TRAINING_ROWS, Adapter, fill
from benchmarks.probe import Probe
from benchmarks.settings import OURS, Settings

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


@dataclass
class Side:
    """Copies of a layer, and the name of the bare one of its package."""

    name: str
    modules: list[nn.Module]
    layer: Layer
    probe: Probe
    bare: str
    whole: Whole | None = None  # None: without an adapter


def run(settings: Settings) -> list[dict]:
    """Cases of every shape, base, dtype, M and direction."""
    rows = []
    wanted = [M for M in sorted(settings.rows_of_x) if M >= TRAINING_ROWS]
    for label, N, K in settings.shapes if wanted else ():
        if not settings.fits("dora_linear", label, N, K, 4):
            continue
        weight = torch.randn(N, K, device=settings.device) * 0.02
        adapter = Adapter.of(N, K, settings.device)
        for base, packages in BASES.items():
            for short, dtype in settings.dtypes.items():
                sides = []
                for package in packages:
                    sides += _sides(settings, package, weight, dtype, adapter)
                for M in wanted:
                    for backward in (False, True) if sides else ():
                        direction = "forward + backward" if backward else "forward"
                        case = f"{label} M={M} over {base} {short}, {direction}"
                        contenders = [_contender(side, M, backward) for side in sides]
                        rows += settings.compare(
                            "dora_linear", case, contenders, sides[0].name, "read"
                        )
    return rows


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
        return Side(name, modules, layer, rescaled, bare, whole)

    made = [Side(bare, [copy.deepcopy(layer.module) for _ in range(count)], layer, probe, bare)]
    if package in ("torch", "lowrank"):
        made.append(side("lowrank", _with_lowrank))
    if "peft" in settings.against and package in ("torch", "bitsandbytes"):
        made.append(side("peft" if package == "torch" else "peft + bitsandbytes", _with_peft))
    return made


def _with_lowrank(base: nn.Module) -> nn.Module:
    import lowrank

    config = lowrank.LoRAConfig(r=RANK, lora_alpha=ALPHA, use_dora=True)
    return lowrank.LoRALinear.wrap(base, config)


def _with_peft(base: nn.Module) -> nn.Module:
    if peers.missing("bitsandbytes") is None:
        peers.bitsandbytes()  # peft would import it, from the wrong place
    with peers.quiet():
        import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=["projection"])
    model = peft.get_peft_model(nn.ModuleDict({"projection": base}), config)
    return model.base_model.model["projection"]


def _contender(side: Side, M: int, backward: bool) -> Contender:
    x, dy = side.probe.inputs(M)
    exact = side.whole.gradients(x, dy) if side.whole and backward else {}

    def call(i: int) -> tuple[Tensor, ...]:
        leaf, module = x.detach().requires_grad_(), side.modules[i]
        y = module(leaf)
        if not backward:
            return (y.detach(),)
        y.backward(dy)
        outputs = [y.detach(), leaf.grad]
        for part in exact:
            weight = getattr(module, part)["default"].weight
            outputs.append(weight.grad)
            weight.grad = None
        return tuple(outputs)

    def error(outputs: tuple[Tensor, ...]) -> float:
        errors = [side.probe.error(*outputs[:2])]
        errors += map(relative_error, outputs[2:], exact.values())
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    for module in side.modules:
        module.train()
    (N, K), rank, itemsize = side.layer.shape, RANK if side.whole else 0, x.element_size()
    passes, factors = 2 if backward else 1, 4 * rank * (N + K)
    moved = passes * (side.layer.stored_bytes + M * (K + N) * itemsize + factors)
    norms = side.layer.stored_bytes if side.whole else 0  # W once more, for A Wᵀ
    if backward and side.whole:
        moved += M * K * itemsize + factors  # x once more, for dA
    flops = passes * 2 * M * N * K + (6 if backward else 2) * M * rank * (N + K) + 2 * rank * N * K
    return Contender(
        side.name,
        call,
        len(side.modules),
        error,
        LIMITS[x.dtype] if side.name.startswith(OURS) else None,
        moved=moved + norms,
        flops=flops,
        dtype=str(x.dtype).removeprefix("torch."),
        bare=side.bare if side.whole else "",
    )
