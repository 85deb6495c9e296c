"""y = x Wᵀ, and dX = dY W after it, over an NF4 weight: as modules, from memory, beside dense
torch.

Every M has one case with all sides in it, in float32 and bfloat16, so that the dtypes too are
compared within one loop. M = 128 and more also has a case of the forward and the backward together.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import peers
from benchmarks.harness import ONCE_SECONDS, Contender, copies_for, relative_error
from benchmarks.settings import Settings

DTYPES = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 1e-2)}
FEW_ROWS = 8  # of x: what the backend cpu_int16 multiplies in fixed point
FIXED_POINT_ERROR = 2e-4
TRAINING_ROWS = 128  # below, a forward alone is what happens: decoding


def run(settings: Settings) -> list[dict]:
    """Cases of every shape, M, and direction."""
    rows = []
    for label, out_features, in_features in settings.shapes:
        weight = torch.randn(out_features, in_features) * 0.02
        sides = []
        for dtype_name, (dtype, limit) in DTYPES.items():
            for name in ("lowrank", "torch", "bitsandbytes"):
                if name == "lowrank" or name in settings.against:
                    layer = peers.LAYERS[name](weight, dtype)
                    modules = layer.copies(copies_for(layer.stored_bytes, settings.working_set))
                    sides.append((f"{name} {dtype_name}", layer, modules, limit))
        for backward in (True, False):
            if not backward:
                _settle(sides)
            rows += _sweep(settings, label, sides, backward)
    return rows


def _sweep(settings: Settings, label: str, sides: list, backward: bool) -> list[dict]:
    """Cases of rising M; a side that takes seconds for a call is not asked for more rows."""
    direction = "forward + dX" if backward else "forward"
    rows, running = [], list(sides)
    for count in sorted(settings.rows_of_x):
        if backward and count < TRAINING_ROWS:
            continue
        contenders = [_contender(*side, count, backward) for side in running]
        if not backward and count <= FEW_ROWS:
            contenders.insert(1, _fixed_point(contenders[0]))
        case = f"{label} M={count} {direction}"
        made = settings.compare("codebook_linear", case, contenders, "torch fp32", "read")
        rows += made
        for row in made:
            if row["median_ms"] > 1e3 * ONCE_SECONDS:
                name = row["contender"]
                running = [side for side in running if side[0] != name]
                settings.note(
                    f"{name}, {direction}: M > {count} was left out, as M = {count} takes "
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
        limit=FIXED_POINT_ERROR,
        path=ours.path.replace("cpu", "cpu_int16"),
    )


def _settle(sides) -> None:
    """One row through every module: some rearrange their weight at the first inference.

    bitsandbytes does where there is AVX-512 bf16, and has no backward afterwards: hence backward
    comes first.
    """
    for _, layer, modules, _ in sides:
        for module in modules:
            with torch.no_grad():
                module.eval()(torch.zeros(1, layer.exact.shape[1], dtype=layer.dtype))


def _contender(
    name: str,
    layer: peers.Layer,
    modules: list[torch.nn.Module],
    limit: float,
    count: int,
    backward: bool,
) -> Contender:
    out_features, in_features = layer.exact.shape
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, in_features, generator=generator).to(layer.dtype)
    dy = torch.randn(count, out_features, generator=generator).to(layer.dtype)
    exact_y = x.double() @ layer.exact.T
    exact_dx = dy.double() @ layer.exact if backward else None

    def forward(i: int) -> torch.Tensor:
        with torch.no_grad():
            return modules[i](x)

    def forward_backward(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.detach().requires_grad_()
        y = modules[i](leaf)
        y.backward(dy)
        return y.detach(), leaf.grad

    def error(outputs) -> float:
        if backward:
            return max(relative_error(outputs[0], exact_y), relative_error(outputs[1], exact_dx))
        return relative_error(outputs, exact_y)

    for module in modules:
        module.train(backward)
    path = ""
    if layer.name == "lowrank":
        weight = peers.operands(layer.module.storage)
        path = peers.chosen_backend("codebook_linear", x, *weight, None, peers.BLOCK_SIZE)
    passes = 2 if backward else 1
    return Contender(
        name,
        forward_backward if backward else forward,
        len(modules),
        error,
        limit if layer.checked else None,
        moved=passes
        * (layer.stored_bytes + count * (in_features + out_features) * layer.dtype.itemsize),
        flops=passes * 2 * count * out_features * in_features,
        path=path,
    )
