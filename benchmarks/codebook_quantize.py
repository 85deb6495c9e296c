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
    for label, out_features, in_features in settings.shapes:
        weight = torch.randn(out_features, in_features) * 0.02
        count = copies_for(nbytes(weight), settings.working_set)
        weights = [weight, *(weight.clone() for _ in range(count - 1))]
        sides = [_lowrank(weights)]
        if "bitsandbytes" in settings.against:
            sides.append(_bitsandbytes(weights))
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
