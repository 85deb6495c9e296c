"""NF4 with double quantization back to dense weights, beside a plain copy of as many bytes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.codebook_dequantize import OPERATIONS
from benchmarks.gpu.session import Session
from benchmarks.harness import Contender, nbytes, relative_error


def run(session: Session) -> None:
    """One case a shape."""
    for label, N, K in session.shapes:
        dense = torch.randn(N, K, device=session.device) * 0.02
        session.compare("codebook_dequantize", label, _contenders(session, dense), "copy")


def _contenders(session: Session, dense: Tensor) -> list[Contender]:
    from lowrank import ops

    weights, exact = session.quantized(dense)
    dtype, K = session.dtype, dense.shape[1]
    values = exact.to(dtype)
    error = partial(relative_error, exact=exact)
    options = (K, peers.BLOCK_SIZE, dtype)
    return [
        Contender(
            "torch copy",  # of as many bytes written: what writing alone takes
            lambda i: values.clone(),
            2,
            error,
            session.limit,
            2 * values.nbytes,
        ),
        Contender(
            "lowrank",
            lambda i: ops.codebook_dequantize(*weights[i], *options),
            len(weights),
            error,
            session.limit,
            nbytes(weights[0]) + values.nbytes,
            OPERATIONS * dense.numel(),
            peers.chosen_backend("codebook_dequantize", *weights[0], *options),
        ),
    ]
