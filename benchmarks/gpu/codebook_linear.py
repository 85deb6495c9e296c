"""y = x Wᵀ, and dx = dy W, over an NF4 weight: beside dense torch, both of our own ways, and
bitsandbytes.

Each M has a case of the forward and one of dX. `from codes` and `through scratch` are the two ways
that the dispatch chooses from, whatever it chose: they tell where its table should change, and
`CUDA C++` whether the decode kernel of that backend should come before Triton's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.gpu import timing
from benchmarks.gpu.session import Session, Weight
from benchmarks.harness import Contender, nbytes, relative_error

MOST_GRAPHED_ROWS = 16  # above, a launch is hidden behind the kernel before it
CUDA_CPP = "lowrank, CUDA C++"
G = peers.BLOCK_SIZE


def run(session: Session) -> list[dict]:
    """Two cases a shape and M."""
    rows = []
    for label, N, K in session.shapes:
        dense = torch.randn(N, K, device=session.device) * 0.02
        for M in session.rows_of_x:
            for transposed, direction in ((False, "forward"), (True, "dX")):
                contenders = _products(session, dense, M, transposed)
                case = f"{label} M={M} {direction}"
                rows += session.compare("codebook_linear", case, contenders, "torch", "read")
    return rows


def _products(session: Session, dense: Tensor, M: int, transposed: bool) -> list[Contender]:
    """y = x Wᵀ, or dx = dy W where `transposed`: dense, ours, ours by name, ours as a graph."""
    from lowrank import ops

    dtype, device, (N, K) = session.dtype, session.device, dense.shape
    weights, exact = session.quantized(dense)
    x = torch.randn(M, N if transposed else K, device=device).to(dtype)
    product = x.double() @ (exact if transposed else exact.T)
    flops, streamed = 2 * M * N * K, M * (N + K) * dtype.itemsize
    op = "codebook_linear_dx" if transposed else "codebook_linear"
    last = (K, G) if transposed else (None, G)

    dense_copies = session.copies(dense.numel() * dtype.itemsize)
    matrices = [exact.to(dtype) for _ in range(dense_copies)]
    error = functools.partial(relative_error, exact=product)

    kind = str(dtype).removeprefix("torch.")

    def contender(name: str, call: Callable, copies: int, stored: int, path: str = "") -> Contender:
        moved = stored + streamed
        return Contender(name, call, copies, error, session.limit, moved, flops, path, kind)

    def by_torch(i: int) -> Tensor:
        return x @ matrices[i] if transposed else F.linear(x, matrices[i])

    def by_lowrank(i: int) -> Tensor:
        return getattr(ops, op)(x, *weights[i], *last)

    copies, held = len(weights), nbytes(weights[0])
    path = peers.chosen_backend(op, x, *weights[0], *last)
    made = [
        contender("torch", by_torch, dense_copies, matrices[0].nbytes),
        contender("lowrank", by_lowrank, copies, held, path),
    ]
    if device.type != "cuda":
        return made
    named = _named_paths(x, weights, last, transposed)
    for name, call in named.items():
        made.append(contender(name, call, copies, held))
    if M <= MOST_GRAPHED_ROWS:
        graphs = [
            ("torch", by_torch, dense_copies, matrices[0].nbytes),
            ("lowrank", by_lowrank, copies, held),
        ]
        if CUDA_CPP in named:
            graphs.append((CUDA_CPP, named[CUDA_CPP], copies, held))
        for name, call, count, stored in graphs:
            graph = timing.graphed(call, count)
            made.append(contender(f"{name}, CUDA graph", graph, count, stored))
    if not transposed and "bitsandbytes" in session.against:
        made.append(_bitsandbytes(session, dense, x, flops, streamed))
    return made


def _named_paths(
    x: Tensor, weights: list[Weight], last: tuple, transposed: bool
) -> dict[str, Callable[[int], Tensor]]:
    """The two ways of the Triton backend; from codes as far as its tiles go; and CUDA C++."""
    from lowrank.ops import cuda
    from lowrank.ops.triton import codebook as backend

    direct = backend.dx_from_codes if transposed else backend.linear_from_codes
    scratch = backend.dx_through_scratch if transposed else backend.linear_through_scratch
    ways = {"lowrank, through scratch": lambda i: scratch(x, *weights[i], *last)}
    if x.shape[0] <= backend.fused_rows(x.device, x.dtype):
        ways["lowrank, from codes"] = lambda i: direct(x, *weights[i], *last)
    few = x.shape[0] <= cuda.most_fused_rows(x.device, x.dtype)
    if few and not transposed and cuda.missing() is None:
        ways[CUDA_CPP] = lambda i: cuda.linear_from_codes(x, *weights[i], *last)
    return ways


def _bitsandbytes(
    session: Session, dense: Tensor, x: Tensor, flops: int, streamed: int
) -> Contender:
    """Its Linear4bit, held to the values that its own tensors stand for."""
    bnb = peers.bitsandbytes()
    layers = []
    for _ in range(session.copies(dense.numel() // 2)):
        layer = bnb.nn.Linear4bit(
            dense.shape[1], dense.shape[0], bias=False, compute_dtype=x.dtype, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(
            dense.to(x.dtype), requires_grad=False, quant_type="nf4", module=layer
        )
        layers.append(layer.to(dense.device))
    tensors = peers.bitsandbytes_tensors(layers[0].weight.data, layers[0].weight.quant_state)
    exact = peers.exact_bitsandbytes(tuple(t.cpu() for t in tensors), dense.shape)
    product = x.double() @ exact.to(dense.device).T

    def call(i: int) -> Tensor:
        with torch.no_grad():
            return layers[i](x)

    error = functools.partial(relative_error, exact=product)
    return Contender(
        "bitsandbytes",
        call,
        len(layers),
        error,
        moved=nbytes(tensors) + streamed,
        flops=flops,
        dtype=str(x.dtype).removeprefix("torch."),
    )
