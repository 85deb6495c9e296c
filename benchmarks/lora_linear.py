"""A linear layer with a LoRA adapter, beside the same layer frozen and without one.

Over a dense base and over NF4, each M has a case of the forward and one of forward and backward:
dX, dA and dB. `over bare` is the time over that of the frozen layer of the same package in the same
case, which has a forward and dX alone: what the adapter costs.
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
from benchmarks.probe import Probe
from benchmarks.settings import OURS, Settings

RANK, ALPHA = 16, 32
SCALE = ALPHA / RANK
TRAINING_ROWS = 128  # below, nobody trains
BASES = {"dense": ("torch",), "NF4": ("lowrank", "bitsandbytes")}


@dataclass
class Adapter:
    """A [R, K] and B [N, R] in float32, the same on every side; B is no longer zero."""

    A: Tensor
    B: Tensor

    @classmethod
    def of(cls, N: int, K: int, device: torch.device) -> Adapter:
        A, B = torch.randn(RANK, K, device=device), torch.randn(N, RANK, device=device)
        return cls(A * K**-0.5, B * 0.1)

    def gradients(self, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        """dA = s (dy B)ᵀ x and dB = s dyᵀ (x Aᵀ), over all rows, in float64."""
        x, dy, A, B = x.double(), dy.double(), self.A.double(), self.B.double()
        return {"lora_A": SCALE * (dy @ B).T @ x, "lora_B": SCALE * dy.T @ (x @ A.T)}


@dataclass
class Side:
    """Copies of a layer, the bare one of its package (itself, where it has no adapter), and the
    exact gradients of an adapter's parts by x and dy.
    """

    name: str
    modules: list[nn.Module]
    layer: Layer
    probe: Probe
    bare: str
    gradients: Callable[[Tensor, Tensor], dict[str, Tensor]] | None = None

    @property
    def adapted(self) -> bool:
        return self.gradients is not None


def run(settings: Settings) -> list[dict]:
    """Cases of every shape, base, dtype, M and direction."""
    return compare(settings, "lora_linear", _sides, _contender)


def compare(
    settings: Settings,
    benchmark: str,
    sides_of: Callable[[Settings, str, Tensor, torch.dtype, Adapter], list[Side]],
    contender_of: Callable[[Side, int, bool], Contender],
) -> list[dict]:
    """Cases of every shape, base, dtype, M and direction, of the sides of each base's packages."""
    rows = []
    wanted = [M for M in sorted(settings.rows_of_x) if M >= TRAINING_ROWS]
    for label, N, K in settings.shapes if wanted else ():
        if not settings.fits(benchmark, label, N, K, 4):
            continue
        weight = torch.randn(N, K, device=settings.device) * 0.02
        adapter = Adapter.of(N, K, settings.device)
        for base, packages in BASES.items():
            for short, dtype in settings.dtypes.items():
                sides = []
                for package in packages:
                    sides += sides_of(settings, package, weight, dtype, adapter)
                for M in wanted:
                    for backward in (False, True) if sides else ():
                        direction = "forward + backward" if backward else "forward"
                        case = f"{label} M={M} over {base} {short}, {direction}"
                        contenders = [contender_of(side, M, backward) for side in sides]
                        rows += settings.compare(benchmark, case, contenders, sides[0].name, "read")
    return rows


def _sides(
    settings: Settings, package: str, weight: Tensor, dtype: torch.dtype, adapter: Adapter
) -> list[Side]:
    """The bare layer over a package's base, ours with an adapter if we have it, and peft's."""
    if package != "lowrank" and package not in settings.against:
        return []
    layer = LAYERS[package](weight, dtype)
    probe = Probe.of(layer.exact(), dtype)
    count = copies_for(layer.stored_bytes, settings.working_set)
    bare = f"{package}, frozen"

    def side(name: str, wrap: Callable[[nn.Module], nn.Module]) -> Side:
        modules = [wrap(copy.deepcopy(layer.module)) for _ in range(count)]
        for module in modules:
            fill(module, adapter)
        return Side(name, modules, layer, _adapted(probe, adapter), bare, adapter.gradients)

    made = [Side(bare, [copy.deepcopy(layer.module) for _ in range(count)], layer, probe, bare)]
    if package in ("torch", "lowrank"):
        made.append(side("lowrank", with_lowrank))
    if "peft" in settings.against and package in ("torch", "bitsandbytes"):
        made.append(side("peft" if package == "torch" else "peft + bitsandbytes", with_peft))
    if "unsloth" in settings.against and package == "bitsandbytes":
        made.append(side("unsloth", with_unsloth))
    return made


def with_lowrank(base: nn.Module, use_dora: bool = False) -> nn.Module:
    """lowrank's LoRALinear around a layer."""
    import lowrank

    config = lowrank.LoRAConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, use_dora=use_dora)
    return lowrank.LoRALinear.wrap(base, config)


def with_peft(base: nn.Module, use_dora: bool = False) -> nn.Module:
    """The layer that peft puts in the place of `base` in a model."""
    if peers.missing("bitsandbytes") is None:
        peers.bitsandbytes()  # peft would import it, from the wrong place
    with peers.quiet():
        import peft

    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        use_dora=use_dora,
        target_modules=["projection"],
    )
    model = peft.get_peft_model(nn.ModuleDict({"projection": base}), config)
    return model.base_model.model["projection"]


class UnslothLinear(nn.Module):
    """unsloth's LoRA kernels over the tensors of peft's layer, as its models call them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        with peers.quiet():
            from unsloth.kernels.fast_lora import LoRA_W
        self.product = LoRA_W.apply
        self.base_layer, self.scale = layer.base_layer, layer.scaling["default"]
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base_layer.weight
        A, B = (part["default"].weight for part in (self.lora_A, self.lora_B))
        return self.product(x[None], weight, weight.quant_state, A, B, self.scale)[0]


def with_unsloth(base: nn.Module) -> nn.Module:
    """unsloth's kernels over a bitsandbytes layer."""
    return UnslothLinear(with_peft(base))


@torch.no_grad()
def fill(module: nn.Module, adapter: Adapter) -> None:
    """Give a layer of ours or peft's the values of the adapter."""
    module.lora_A["default"].weight.copy_(adapter.A)
    module.lora_B["default"].weight.copy_(adapter.B)


def contender(side: Side, M: int, backward: bool) -> Contender:
    """The forward, or with dX and an adapter's gradients, and what a LoRA's moves and computes."""
    x, dy = side.probe.inputs(M)
    exact = side.gradients(x, dy) if side.gradients and backward else {}

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
    (N, K), rank, itemsize = side.layer.shape, RANK if side.adapted else 0, x.element_size()
    passes = 2 if backward else 1
    factors = 4 * rank * (N + K)  # bytes of A and B, and as many of their gradients
    moved = passes * (side.layer.stored_bytes + M * (K + N) * itemsize + factors)
    if backward and side.adapted:
        moved += M * K * itemsize + factors  # x once more, for dA
    return Contender(
        side.name,
        call,
        len(side.modules),
        error,
        LIMITS[x.dtype] if side.name.startswith(OURS) else None,
        moved=moved,
        flops=passes * 2 * M * N * K + (6 if backward else 2) * M * rank * (N + K),
        dtype=str(x.dtype).removeprefix("torch."),
        bare=side.bare if side.adapted else "",
    )


def _contender(side: Side, M: int, backward: bool) -> Contender:
    made = contender(side, M, backward)
    return replace(made, path=_path(side, M)) if side.name.startswith(OURS) else made


def _adapted(probe: Probe, adapter: Adapter) -> Probe:
    """The same known rows through base and adapter: y and dX are sums over rows of their own."""
    A, B = adapter.A.double(), adapter.B.double()
    return replace(
        probe,
        exact_y=probe.exact_y + SCALE * (probe.x.double() @ A.T) @ B.T,
        exact_dx=probe.exact_dx + SCALE * (probe.dy.double() @ B) @ A,
    )


def _path(side: Side, M: int) -> str:
    x, module = side.probe.x.new_zeros(M, side.layer.shape[1]), side.modules[0]
    base = module.base_layer if side.adapted else module
    if isinstance(base, nn.Linear):
        weight = (base.weight, None, None, None)
    else:
        weight = peers.operands(base.storage)
    if not side.adapted:
        return peers.chosen_backend("codebook_linear", x, *weight, None, peers.BLOCK_SIZE)
    A, B = (part["default"].weight[None] for part in (module.lora_A, module.lora_B))
    rest = (None, peers.BLOCK_SIZE, A, B, SCALE, None, None, 0.0, None)
    return peers.chosen_backend("lora_linear", x, *weight, *rest)
