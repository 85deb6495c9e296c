"""Dense float32 weights to NF4 with double quantization. The error is that of the round trip."""

from __future__ import annotations

import torch

from benchmarks import peers
from benchmarks.harness import Contender, copies_for, nbytes, relative_error
from benchmarks.settings import Settings

OPERATIONS = 3  # an element: a comparison for the block's largest, a product, a code
NF4_ERROR = 0.11  # of normally distributed weights, blocks of 64: 0.096 and a little for the scales


def run(settings: Settings) -> list[dict]:
    """One case a shape."""
    rows = []
    for label, N, K in settings.shapes:
        if not settings.fits("codebook_quantize", label, N, K, 8):
            continue
        weight = torch.randn(N, K, device=settings.device) * 0.02
        count = copies_for(nbytes(weight), settings.working_set)
        weights = [weight, *(weight.clone() for _ in range(count - 1))]
        sides = [
            SIDES[name](weights)
            for name in settings.sides("codebook_quantize", label, N, K, list(SIDES))
        ]
        rows += settings.compare(
            "codebook_quantize", f"{label} from fp32", sides, "bitsandbytes", "read"
        )
    return rows


def _lowrank(weights: list[torch.Tensor]) -> Contender:
    quantizer, exact = peers.lowrank_quantizer(), weights[0].double()
    storage = quantizer.quantize(weights[0])

    def error(tensors: tuple[torch.Tensor, ...]) -> float:
        made = type(storage)(
            storage.scheme,
            storage.shape,
            storage.dtype,
            dict(zip(storage.tensors, tensors, strict=True)),
            storage.options,
        )
        return relative_error(peers.exact_lowrank(made), exact)

    return Contender(
        "lowrank",
        lambda i: tuple(quantizer.quantize(weights[i]).tensors.values()),
        len(weights),
        error,
        NF4_ERROR,
        moved=nbytes(weights[0]) + storage.nbytes,
        flops=OPERATIONS * weights[0].numel(),
        path=peers.chosen_backend(
            "codebook_quantize", weights[0], storage.tensors["codebook"], peers.BLOCK_SIZE
        ),
    )


def _bitsandbytes(weights: list[torch.Tensor]) -> Contender:
    functional, exact = peers.bitsandbytes().functional, weights[0].double()

    def quantize(i: int) -> tuple[torch.Tensor, ...]:
        return peers.bitsandbytes_tensors(
            *functional.quantize_4bit(
                weights[i], blocksize=peers.BLOCK_SIZE, quant_type="nf4", compress_statistics=True
            )
        )

    return Contender(
        "bitsandbytes",
        quantize,
        len(weights),
        lambda tensors: relative_error(peers.exact_bitsandbytes(tensors, exact.shape), exact),
        moved=nbytes(weights[0]) + nbytes(quantize(0)),
        flops=OPERATIONS * weights[0].numel(),
    )


def _torchao(weights: list[torch.Tensor]) -> Contender:
    exact = weights[0].double()
    return Contender(
        "torchao",
        lambda i: peers.torchao_nf4(weights[i]),
        len(weights),
        lambda held: relative_error(peers.exact_torchao(held), exact),
        moved=nbytes(weights[0]) + peers.torchao_bytes(peers.torchao_nf4(weights[0])),
        flops=OPERATIONS * weights[0].numel(),
    )


SIDES = {"lowrank": _lowrank, "bitsandbytes": _bitsandbytes, "torchao": _torchao}
