"""The loss of a language model's head, and its gradient in x: never all logits, or all of them.

T rows of x [T, H], a frozen head W [V, H], the summed cross entropy of softmax(x Wᵀ), and dX. A
case has labels in every row, another in half of them: what is masked need not be multiplied, and
operations are counted for the labelled rows alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Contender, copies_for, relative_error
from benchmarks.settings import Settings

IGNORED = -100
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of ours
TRAINING_ROWS = 128  # below, nobody trains
CHUNK_LOGITS = 1 << 23  # that `torch, in chunks` holds at once, as we do

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, head, labels -> scalar


def run(settings: Settings) -> list[dict]:
    """Two cases a head, dtype and T."""
    rows = []
    for label, V, H in settings.heads:
        names = [name for name in SIDES if name == "lowrank" or name in settings.against]
        if not settings.fits("linear_cross_entropy", label, V, H, len(names)):
            continue
        for short, dtype in settings.dtypes.items():
            device = settings.device
            head = (torch.randn(V, H, device=device) * H**-0.5).to(dtype)
            for T in sorted(settings.rows_of_x):
                for masked in (False, True) if T >= TRAINING_ROWS else ():
                    peers.forget_compiled()
                    x = torch.randn(T, H, device=device).to(dtype)
                    labels = torch.randint(V, (T,), device=device)
                    if masked:
                        labels[torch.randperm(T, device=device)[: T // 2]] = IGNORED
                    case = f"{label} {short} T={T}, {'half' if masked else 'all'} labelled"
                    rows += settings.compare(
                        "linear_cross_entropy",
                        f"{case} forward + dX",
                        _contenders(names, x, head, labels, settings.working_set),
                        "torch",
                        "read",
                    )
    return rows


def _contenders(
    names: list[str], x: Tensor, head: Tensor, labels: Tensor, working_set: int
) -> list[Contender]:
    exact = exact_loss(x, head, labels)
    labelled, (V, H) = int((labels != IGNORED).sum()), head.shape
    sides = {side: loss for name in names for side, loss in SIDES[name]().items()}
    # a head larger than the working set pushes itself out of the cache: one for all of them
    copies = 1 if head.nbytes > working_set else copies_for(head.nbytes, working_set)
    made = []
    for name, loss in sides.items():
        heads = [head] if copies == 1 else [head.clone() for _ in range(copies)]
        made.append(
            Contender(
                name,
                lambda i, loss=loss, heads=heads: loss_and_gradient(loss, x, heads[i], labels),
                copies,
                lambda outputs: max(map(relative_error, outputs, exact)),
                LIMITS[x.dtype] if name == "lowrank" else None,
                moved=head.nbytes + 2 * x.nbytes + labels.nbytes,
                flops=2 * 2 * labelled * V * H,
                path=_path(x, head, labels) if name == "lowrank" else "",
                dtype=str(x.dtype).removeprefix("torch."),
            )
        )
        if name == "compile":
            with peers.quiet():
                made[-1].call(0)
    return made


def loss_and_gradient(loss: Loss, x: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss and its gradient in x, as a training step asks for them."""
    leaf = x.detach().requires_grad_()
    value = loss(leaf, head, labels)
    value.backward()
    return value.detach(), leaf.grad


def exact_loss(x: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64, a few rows and words at a time."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    dx = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for rows in (labels != IGNORED).nonzero()[:, 0].split(512):
        inputs, targets = x[rows].double(), labels[rows]
        logits = torch.cat([inputs @ part.double().T for part in head.split(8192)], dim=1)
        total += F.cross_entropy(logits, targets, reduction="sum")
        gradient = logits.softmax(1)
        gradient[torch.arange(len(rows), device=x.device), targets] -= 1
        for part, columns in zip(head.split(8192), gradient.split(8192, dim=1), strict=True):
            dx[rows] += columns @ part.double()
    return total, dx


def all_logits(x: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """As transformers' models compute it."""
    logits = F.linear(x, head).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


class InChunks(torch.autograd.Function):
    """`all_logits` for a few rows at a time, the gradient formed with them."""

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        total, gradients = x.new_zeros((), dtype=torch.float32), []
        rows = max(1, CHUNK_LOGITS // head.shape[0])
        for part, targets in zip(x.split(rows), labels.split(rows), strict=True):
            with torch.enable_grad():
                value, gradient = loss_and_gradient(all_logits, part, head, targets)
            total += value
            gradients.append(gradient)
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        return ctx.saved_tensors[0] * scale, None, None


def _lowrank() -> dict[str, Loss]:
    from lowrank import ops

    return {"lowrank": ops.linear_cross_entropy}


def _liger() -> dict[str, Loss]:
    with peers.quiet():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

    def loss(x: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return fused(x, head, labels, ignore_index=IGNORED, reduction="sum")

    return {"liger": loss}


def _path(x: Tensor, head: Tensor, labels: Tensor) -> str:
    return peers.chosen_backend("linear_cross_entropy", x, head, labels, True)


SIDES: dict[str, Callable[[], dict[str, Loss]]] = {
    "lowrank": _lowrank,
    "torch": lambda: {"torch": all_logits, "torch, in chunks": InChunks.apply},
    "compile": lambda: {"compile": peers.compiled(all_logits)},
    "liger": _liger,
}
