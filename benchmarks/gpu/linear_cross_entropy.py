"""The loss of a frozen head of 128256 words and its gradient in x, beside torch's over all logits.

Extra memory is what this operator is for: T logits of 128256 words in float32 take T / 2 MB, and
their gradient as much again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu.session import Session
from benchmarks.harness import Contender, relative_error

V, H = 128_256, 4096
ROWS = (4096, 8192)
CHECKED = 256  # rows whose gradient is compared with float64
TORCH_BYTES = 20  # for each logit: in the run's dtype and float32, softmax and gradients


def run(session: Session) -> None:
    """A case for each T, and the last with labels for half of the rows, as instructions have."""
    on_gpu = session.device.type == "cuda"
    vocabulary, width, counts = (V, H, ROWS) if on_gpu else (1000, 64, (48,))
    weight = torch.randn(vocabulary, width, device=session.device) / width**0.5
    weight = weight.to(session.dtype)
    for T, share in (*((T, 1.0) for T in counts), (counts[-1], 0.5)):
        x = torch.randn(T, width, device=session.device).to(session.dtype)
        labels = torch.randint(vocabulary, (T,), device=session.device)
        labels[int(T * share) :] = -100
        case = f"V={vocabulary} H={width} T={T}" + ("" if share == 1 else " half labelled")
        sides = _contenders(session, x.requires_grad_(), weight, labels)
        session.compare("linear_cross_entropy", case, sides, "read")


def _contenders(session: Session, x: Tensor, weight: Tensor, labels: Tensor) -> list[Contender]:
    from lowrank import ops

    exact = _exact_dx(x, weight, labels)
    kept = int((labels >= 0).sum())
    flops, moved = 4 * kept * weight.numel(), 2 * weight.nbytes + 2 * x.nbytes

    def error(dx: Tensor) -> float:
        return relative_error(dx[:CHECKED], exact)

    def by_torch(i: int) -> Tensor:
        logits = F.linear(x, weight).float()
        loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        return torch.autograd.grad(loss, x)[0]

    def by_lowrank(i: int) -> Tensor:
        return torch.autograd.grad(ops.linear_cross_entropy(x, weight, labels), x)[0]

    path = peers.chosen_backend("linear_cross_entropy", x, weight, labels, True)
    made = [Contender("lowrank", by_lowrank, 1, error, session.limit, moved, flops, path)]
    if _fits(session.device, labels.numel() * weight.shape[0] * TORCH_BYTES):
        made.insert(0, Contender("torch", by_torch, 1, error, None, moved, flops))
    return made


def _fits(device: torch.device, size: int) -> bool:
    return device.type != "cuda" or size < torch.cuda.mem_get_info(device)[0]


def _exact_dx(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """dx of the first rows in float64."""
    rows = x[:CHECKED].detach().double().requires_grad_()
    logits, labels = rows @ weight.double().T, labels[:CHECKED]
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return torch.autograd.grad(loss, rows)[0]
