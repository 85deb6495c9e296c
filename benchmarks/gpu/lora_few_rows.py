"""A LoRA linear over NF4 on few rows of x, as in decoding: forward alone, one adapter and many.

Beside the dense frozen layer and plain torch's adapter on it. `from codes` and `through BLAS` are
the two ways that the dispatch chooses from, whatever it chose: they tell where its table, that of
codebook_linear, should change. More rows, and the backward, are in the benchmark lora_linear.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu import timing
from benchmarks.gpu.codebook_linear import MOST_GRAPHED_ROWS
from benchmarks.gpu.session import Session, Weight
from benchmarks.harness import Contender, nbytes, relative_error
from benchmarks.lora_linear import RANK, SCALE, Adapter

MOST_ROWS = 512
MANY = 8  # adapters in a batch


def run(session: Session) -> list[dict]:
    """A case of one adapter a shape and M, and one of several where there are rows for them."""
    rows = []
    for label, N, K in session.shapes:
        dense = torch.randn(N, K, device=session.device) * 0.02
        weights, exact = session.quantized(dense)
        for M in (M for M in session.rows_of_x if M <= MOST_ROWS):
            for E in (1, MANY) if M > 1 else (1,):
                contenders = _contenders(session, weights, exact, M, E)
                case = f"{label} M={M}, " + ("one adapter" if E == 1 else f"{E} adapters")
                rows += session.compare("lora_few_rows", case, contenders, "torch, frozen", "read")
    return rows


def _contenders(
    session: Session, weights: list[Weight], exact: Tensor, M: int, E: int
) -> list[Contender]:
    from lowrank import ops

    dtype, device, (N, K) = session.dtype, session.device, exact.shape
    x = torch.randn(M, K, device=device).to(dtype)
    ids = torch.arange(M, device=device) % E
    order, offsets = ops.group_rows(ids, E) if E > 1 else (None, None)
    adapters = [Adapter.of(N, K, device) for _ in range(E)]
    A, B = (torch.stack([getattr(a, name) for a in adapters]).to(dtype) for name in "AB")
    last = (None, peers.BLOCK_SIZE, A, B, SCALE, order, offsets, 0.0, None)

    frozen = x.double() @ exact.T
    h = torch.einsum("mk,mrk->mr", x.double(), A.double()[ids])
    adapted = frozen + SCALE * torch.einsum("mr,mnr->mn", h, B.double()[ids])
    matrices = [exact.to(dtype) for _ in range(session.copies(N * K * dtype.itemsize))]
    streamed, flops = M * (N + K) * dtype.itemsize, 2 * M * N * K
    kind = str(dtype).removeprefix("torch.")

    def contender(name: str, call: Callable, copies: int, stored: int, path: str = "") -> Contender:
        bare = name.startswith("torch, frozen")
        error = functools.partial(relative_error, exact=frozen if bare else adapted)
        moved = stored + streamed + (0 if bare else A.nbytes + B.nbytes)
        work = flops + (0 if bare else 2 * M * RANK * (N + K))
        return Contender(name, call, copies, error, session.limit, moved, work, path, kind)

    def by_torch(i: int) -> Tensor:
        return F.linear(x, matrices[i])

    def by_torch_with_lora(i: int) -> Tensor:
        return torch.addmm(F.linear(x, matrices[i]), x @ A[0].T, B[0].T, alpha=SCALE)

    def by_lowrank(i: int) -> Tensor:
        return torch.ops.lowrank.lora_linear(x, *weights[i], *last)[0]

    copies, held = len(weights), nbytes(weights[0])
    path = peers.chosen_backend("lora_linear", x, *weights[0], *last)
    sides = [("torch, frozen", by_torch, len(matrices), matrices[0].nbytes)]
    if E == 1:
        sides.append(("torch", by_torch_with_lora, len(matrices), matrices[0].nbytes))
    sides.append(("lowrank", by_lowrank, copies, held))
    made = [contender(*side, path if side[0] == "lowrank" else "") for side in sides]
    if device.type != "cuda":
        return made
    for name, call in _named_paths(x, weights, last).items():
        made.append(contender(name, call, copies, held))
    if M <= MOST_GRAPHED_ROWS:
        for name, call, count, stored in sides:
            graph = timing.graphed(call, count)
            made.append(contender(f"{name}, CUDA graph", graph, count, stored))
    return made


def _named_paths(
    x: Tensor, weights: list[Weight], last: tuple
) -> dict[str, Callable[[int], Tensor]]:
    """The two ways of the Triton backend; from codes as far as its tiles go."""
    from lowrank.ops.triton import codebook, lora

    ways = {"lowrank, through BLAS": lambda i: lora.lora_through_blas(x, *weights[i], *last)[0]}
    if x.shape[0] <= codebook.fused_rows(x.device, x.dtype):
        ways["lowrank, from codes"] = lambda i: lora.lora_from_codes(x, *weights[i], *last)[0]
    return ways
