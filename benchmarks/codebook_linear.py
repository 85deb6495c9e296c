"""y = x Wᵀ, and dX = dY W after it, over an NF4 weight: as modules, from memory, beside dense
torch.

Every M has one case with all sides in it, in every dtype asked for, so that the dtypes too are
compared within one loop. M = 128 and more also has a case of the forward and the backward together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks import peers
from benchmarks.errors import ContenderError
from benchmarks.harness import ONCE_SECONDS, Contender, copies_for
from benchmarks.layers import LAYERS, Layer
from benchmarks.probe import Probe
from benchmarks.settings import OURS, Settings

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of ours
FEW_ROWS = 8  # of x: what the backend cpu_int16 multiplies in fixed point
FIXED_POINT_ERROR = 2e-4
TRAINING_ROWS = 128  # below, a forward alone is what happens: decoding


@dataclass
class Side:
    """One layer in one dtype, its copies, and what it is held to."""

    name: str
    layer: Layer
    modules: list[torch.nn.Module]
    probe: Probe


def run(settings: Settings) -> list[dict]:
    """Cases of every shape, M, and direction."""
    rows = []
    for label, N, K in settings.shapes:
        names = settings.sides("codebook_linear", label, N, K, list(LAYERS))
        if not settings.fits("codebook_linear", label, N, K, len(names) * len(settings.dtypes)):
            continue
        peers.forget_compiled()
        weight = torch.randn(N, K) * 0.02
        sides = []
        for short, dtype in settings.dtypes.items():
            for name in names:
                settings.tell(f"codebook_linear {label}: {name} {short} is made")
                layer = LAYERS[name](weight, dtype)
                probe = Probe.of(layer.exact(), dtype)
                modules = layer.copies(copies_for(layer.stored_bytes, settings.working_set))
                sides.append(Side(f"{name} {short}", layer, modules, probe))
        for backward in (True, False):
            if not backward:
                sides = [side for side in sides if _settles(settings, label, side)]
            rows += _sweep(settings, label, sides, backward)
    return rows


def _sweep(settings: Settings, label: str, sides: list[Side], backward: bool) -> list[dict]:
    """Cases of rising M; a side that takes seconds for a call is not asked for more rows."""
    direction = "forward + dX" if backward else "forward"
    rows, running = [], list(sides)
    for M in sorted(settings.rows_of_x):
        if backward and M < TRAINING_ROWS:
            continue
        contenders = [_contender(side, M, backward) for side in running]
        if not backward and M <= FEW_ROWS and running[0].layer.name == "lowrank":
            contenders.insert(1, _fixed_point(contenders[0]))
        case = f"{label} M={M} {direction}"
        made = settings.compare("codebook_linear", case, contenders, "torch fp32", "read")
        rows += made
        for row in made:
            if row["median_ms"] > 1e3 * ONCE_SECONDS:
                name = row["contender"]
                running = [side for side in running if side.name != name]
                settings.note(
                    f"{name}, {direction}: M > {M} was left out, as M = {M} takes "
                    f"{row['median_ms'] * 1e-3:.1f} s a call"
                )
    return rows


def _fixed_point(ours: Contender) -> Contender:
    """The same calls on the backend that is asked for by name, for speed."""
    from lowrank import ops

    def call(i: int) -> object:
        with ops.use_backend("cpu_int16"):
            return ours.call(i)

    return replace(
        ours,
        name=f"{ours.name}, cpu_int16",
        call=call,
        limit=max(FIXED_POINT_ERROR, ours.limit or 0),
        path=ours.path.replace("cpu", "cpu_int16"),
    )


def _settles(settings: Settings, label: str, side: Side) -> bool:
    """One row through every module: some rearrange their weight at the first inference.

    bitsandbytes does where there is AVX-512 bf16, and has no backward afterwards: hence backward
    comes first. A peer that fails is left out.
    """
    try:
        for module in side.modules:
            with torch.no_grad():
                module.eval()(torch.zeros(1, side.layer.shape[1], dtype=side.layer.dtype))
    except Exception as error:
        if side.layer.name == OURS:
            raise
        settings.note(f"codebook_linear {label}: {ContenderError(side.name, error)}")
        return False
    return True


def _contender(side: Side, M: int, backward: bool) -> Contender:
    layer, modules = side.layer, side.modules
    x, dy = side.probe.inputs(M)

    def forward(i: int) -> torch.Tensor:
        with torch.no_grad():
            return modules[i](x)

    def forward_backward(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.detach().requires_grad_()
        y = modules[i](leaf)
        y.backward(dy)
        return y.detach(), leaf.grad

    def error(outputs) -> float:
        return side.probe.error(*outputs) if backward else side.probe.error(outputs)

    for module in modules:
        module.train(backward)
    call = forward_backward if backward else forward
    if layer.name == "compile":
        with peers.quiet():
            call(0)  # compiling is no part of a first call's memory
    N, K = layer.shape
    passes = 2 if backward else 1
    return Contender(
        side.name,
        call,
        len(modules),
        error,
        LIMITS[layer.dtype] if layer.checked else None,
        moved=passes * (layer.stored_bytes + M * (K + N) * layer.dtype.itemsize),
        flops=passes * 2 * M * N * K,
        path=_path(layer, x),
        dtype=str(layer.dtype).removeprefix("torch."),
    )


def _path(layer: Layer, x: torch.Tensor) -> str:
    if layer.name != "lowrank":
        return ""
    weight = peers.operands(layer.module.storage)
    return peers.chosen_backend("codebook_linear", x, *weight, None, peers.BLOCK_SIZE)
