"""NF4 with double quantization back to dense weights: the scales' decoding is part of the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Contender, copies_for, nbytes, relative_error
from benchmarks.layers import plain_weight
from benchmarks.settings import Settings

OPERATIONS = 1  # an element: its code's value times its block's scale
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of ours


def run(settings: Settings) -> list[dict]:
    """One case a shape and output dtype."""
    rows = []
    for label, N, K in settings.shapes:
        names = settings.sides("codebook_dequantize", label, N, K, list(SIDES))
        if not settings.fits("codebook_dequantize", label, N, K, 2 * len(names)):
            continue
        peers.forget_compiled()
        weight = torch.randn(N, K, device=settings.device) * 0.02
        for short, dtype in settings.dtypes.items():
            contenders = [SIDES[name](weight, dtype, settings.working_set) for name in names]
            case = f"{label} to {short}"
            rows += settings.compare(
                "codebook_dequantize", case, contenders, "bitsandbytes", "copy"
            )
    return rows


def _lowrank(weight: Tensor, dtype: torch.dtype, working_set: int) -> Contender:
    quantizer = peers.lowrank_quantizer()
    storage = quantizer.quantize(weight)
    storages = [storage]
    for _ in range(copies_for(storage.nbytes, working_set) - 1):
        storages.append(quantizer.quantize(weight))
    made = _contender(
        "lowrank",
        lambda i: quantizer.dequantize(storages[i], dtype),
        len(storages),
        peers.exact_lowrank(storage),
        dtype,
        storage.nbytes,
    )
    options = (weight.shape[1], peers.BLOCK_SIZE, dtype)
    made.limit = LIMITS[dtype]
    made.path = peers.chosen_backend("codebook_dequantize", *peers.operands(storage), *options)
    return made


def _compiled(weight: Tensor, dtype: torch.dtype, working_set: int) -> Contender:
    storage = peers.lowrank_quantizer().quantize(weight)
    operands, plain = peers.operands(storage), peers.compiled(plain_weight)
    copies = [operands]
    for _ in range(copies_for(storage.nbytes, working_set) - 1):
        copies.append(tuple(t.clone() for t in operands))

    def call(i: int) -> Tensor:
        return plain(*copies[i], dtype)

    with peers.quiet():
        call(0)  # compiling is no part of a first call's memory
    exact = peers.exact_lowrank(storage)
    return _contender("compile", call, len(copies), exact, dtype, storage.nbytes)


def _copy(weight: Tensor, dtype: torch.dtype, working_set: int) -> Contender:
    """A plain copy of a dense weight: as many bytes written, and more read."""
    values = weight.to(dtype)
    copies = [values.clone() for _ in range(copies_for(values.nbytes, working_set))]
    return _contender(
        "torch, dense copy",
        lambda i: copies[i].clone(),
        len(copies),
        values.double(),
        dtype,
        values.nbytes,
    )


def _bitsandbytes(
    weight: Tensor, dtype: torch.dtype, working_set: int, decode: Callable | None = None
) -> Contender:
    functional = peers.bitsandbytes().functional
    decode = decode or functional.dequantize_4bit
    packed, state = functional.quantize_4bit(
        weight.to(dtype), blocksize=peers.BLOCK_SIZE, quant_type="nf4", compress_statistics=True
    )
    tensors = peers.bitsandbytes_tensors(packed, state)
    copies = [packed.clone() for _ in range(copies_for(nbytes(tensors), working_set))]
    return _contender(
        "bitsandbytes",
        lambda i: decode(copies[i], state),
        len(copies),
        peers.exact_bitsandbytes(tensors, weight.shape),
        dtype,
        nbytes(tensors),
    )


def _unsloth(weight: Tensor, dtype: torch.dtype, working_set: int) -> Contender:
    """unsloth's decoding of bitsandbytes' tensors."""
    with peers.quiet():
        from unsloth.kernels.utils import fast_dequantize
    theirs = _bitsandbytes(weight, dtype, working_set, fast_dequantize)
    return replace(theirs, name="unsloth")


def _torchao(weight: Tensor, dtype: torch.dtype, working_set: int) -> Contender:
    held = peers.torchao_nf4(weight.to(dtype))
    size = peers.torchao_bytes(held)
    copies = [held.clone() for _ in range(copies_for(size, working_set))]
    return _contender(
        "torchao",
        lambda i: copies[i].get_original_weight(),
        len(copies),
        peers.exact_torchao(held),
        dtype,
        size,
    )


def _contender(
    name: str, call: Callable, copies: int, exact: Tensor, dtype: torch.dtype, read: int
) -> Contender:
    """`read` bytes in, a weight of the shape of `exact` in `dtype` out."""
    return Contender(
        name,
        call,
        copies,
        partial(relative_error, exact=exact),
        moved=read + exact.numel() * dtype.itemsize,
        flops=OPERATIONS * exact.numel(),
        dtype=str(dtype).removeprefix("torch."),
    )


SIDES = {
    "lowrank": _lowrank,
    "compile": _compiled,
    "torch": _copy,
    "bitsandbytes": _bitsandbytes,
    "unsloth": _unsloth,
    "torchao": _torchao,
}
