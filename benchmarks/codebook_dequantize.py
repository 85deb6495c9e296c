"""NF4 with double quantization back to dense weights: the scales' decoding is part of the time."""

from __future__ import annotations

import torch

from benchmarks import peers
from benchmarks.harness import Contender, copies_for, nbytes, relative_error
from benchmarks.settings import Settings

OPERATIONS = 1  # an element: its code's value times its block's scale
DTYPES = {"fp32": (torch.float32, 1e-6), "bf16": (torch.bfloat16, 4e-3)}


def run(settings: Settings) -> list[dict]:
    """One case a shape and output dtype."""
    rows = []
    for label, out_features, in_features in settings.shapes:
        weight = torch.randn(out_features, in_features) * 0.02
        for name, (dtype, limit) in DTYPES.items():
            sides = [_lowrank(settings, weight, dtype, limit)]
            if "bitsandbytes" in settings.against:
                sides.append(_bitsandbytes(settings, weight, dtype))
            rows += settings.compare(
                "codebook_dequantize", f"{label} to {name}", sides, "bitsandbytes", "copy"
            )
    return rows


def _lowrank(
    settings: Settings, weight: torch.Tensor, dtype: torch.dtype, limit: float
) -> Contender:
    quantizer = peers.lowrank_quantizer()
    storage = quantizer.quantize(weight)
    count = copies_for(storage.nbytes, settings.working_set)
    storages = [storage, *(quantizer.quantize(weight) for _ in range(count - 1))]
    exact = peers.exact_lowrank(storage)
    return Contender(
        "lowrank",
        lambda i: quantizer.dequantize(storages[i], dtype),
        count,
        lambda dense: relative_error(dense, exact),
        limit,
        moved=storage.nbytes + weight.numel() * dtype.itemsize,
        flops=OPERATIONS * weight.numel(),
        path=peers.chosen_backend(
            "codebook_dequantize",
            *peers.operands(storage),
            weight.shape[1],
            peers.BLOCK_SIZE,
            dtype,
        ),
    )


def _bitsandbytes(settings: Settings, weight: torch.Tensor, dtype: torch.dtype) -> Contender:
    functional = peers.bitsandbytes().functional
    packed, state = functional.quantize_4bit(
        weight.to(dtype), blocksize=peers.BLOCK_SIZE, quant_type="nf4", compress_statistics=True
    )
    tensors = peers.bitsandbytes_tensors(packed, state)
    exact = peers.exact_bitsandbytes(tensors, weight.shape)
    count = copies_for(nbytes(tensors), settings.working_set)
    copies = [packed, *(packed.clone() for _ in range(count - 1))]
    return Contender(
        "bitsandbytes",
        lambda i: functional.dequantize_4bit(copies[i], state),
        count,
        lambda dense: relative_error(dense, exact),
        moved=nbytes(tensors) + weight.numel() * dtype.itemsize,
        flops=OPERATIONS * weight.numel(),
    )
