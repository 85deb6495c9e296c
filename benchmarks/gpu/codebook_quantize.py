"""Dense float32 weights to NF4 with double quantization. The error is that of the round trip."""

from __future__ import annotations

import torch

from benchmarks import peers
from benchmarks.codebook_quantize import NF4_ERROR, OPERATIONS
from benchmarks.gpu.session import Session
from benchmarks.harness import Contender, relative_error


def run(session: Session) -> None:
    """One case a shape."""
    quantizer = peers.lowrank_quantizer()
    for label, N, K in session.shapes:
        dense = torch.randn(N, K, device=session.device) * 0.02
        copies = session.copies(dense.nbytes)
        weights = [dense.clone() for _ in range(copies)]
        ours = Contender(
            "lowrank",
            lambda i, weights=weights: quantizer.quantize(weights[i]),
            copies,
            lambda storage, dense=dense: relative_error(
                peers.exact_lowrank(storage), dense.double()
            ),
            NF4_ERROR,
            dense.nbytes + quantizer.quantize(dense).nbytes,
            OPERATIONS * dense.numel(),
        )
        session.compare("codebook_quantize", label, [ours], "read")
