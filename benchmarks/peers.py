"""The sides of a comparison: lowrank, dense torch, bitsandbytes, each as its own users would call
it.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.installed import missing as missing
from benchmarks.oracle import decode_bitsandbytes, decode_lowrank

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SIZE = 64


def bitsandbytes():
    """The package, quietly, and with the `kernels` it looks for being Hugging Face's if installed.

    From the root of a checkout, `import kernels` would find lowrank's folder of that name.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if Path(entry or ".").resolve() != ROOT]
    try:
        import bitsandbytes as package
    finally:
        sys.path[:] = before
    return package


@dataclass
class Layer:
    """One side's linear layer over one weight: `exact` [N, K] float64 is what its stored weight
    stands for.
    """

    name: str
    module: nn.Module
    dtype: torch.dtype
    exact: Tensor
    stored_bytes: int
    checked: bool = (
        False  # whether an inexact result is an error (ours) or a number to print (a peer's)
    )

    def copies(self, count: int) -> list[nn.Module]:
        """`count` modules with memory of their own."""
        return [self.module, *(copy.deepcopy(self.module) for _ in range(count - 1))]


def dense_layer(weight: Tensor, dtype: torch.dtype) -> Layer:
    """nn.Linear over the unquantized weight in `dtype`."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
    module.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
    held = module.weight
    return Layer("torch", module, dtype, held.double(), held.numel() * held.element_size())


def lowrank_layer(weight: Tensor, dtype: torch.dtype) -> Layer:
    """lowrank.QuantLinear, NF4 with double quantization."""
    import lowrank

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    module = lowrank.QuantLinear.from_linear(linear, lowrank_quantizer())
    storage = module.storage
    return Layer("lowrank", module, dtype, exact_lowrank(storage), storage.nbytes, checked=True)


def chosen_backend(op: str, *args) -> str:
    """The backend that lowrank runs `op` on for these arguments; the instruction set too, for C++.

    `args` are those of `torch.ops.lowrank.<op>`.
    """
    from lowrank import ops
    from lowrank.ops import native

    match = re.search(r"^\s+(\w+): runs$", ops.explain(op, *args), re.MULTILINE)
    backend = match[1] if match else "none"
    return f"{backend} {native.isa()}" if backend == "cpu" else backend


def operands(storage) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The tensors of a storage in the order in which the operators take them."""
    tensors = storage.tensors
    return (
        tensors["packed"],
        tensors["absmax"],
        tensors.get("absmax_scale"),
        tensors["codebook"],
    )


def lowrank_quantizer():
    """NF4 with double quantization, lowrank's."""
    from lowrank import quant

    return quant.get("nf4", block_size=BLOCK_SIZE, double_quant=True)


def exact_lowrank(storage) -> Tensor:
    """The float64 weight [N, K] of one of lowrank's storages."""
    tensors = storage.tensors
    return decode_lowrank(
        tensors["packed"],
        tensors["absmax"],
        tensors.get("absmax_scale"),
        tensors["codebook"],
        storage.shape[1],
        BLOCK_SIZE,
    )


def bitsandbytes_layer(weight: Tensor, dtype: torch.dtype) -> Layer:
    """bitsandbytes' Linear4bit, NF4 with double quantization (its compress_statistics)."""
    bnb = bitsandbytes()
    module = bnb.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compute_dtype=dtype,
        quant_type="nf4",
        compress_statistics=True,
    )
    module.weight = bnb.nn.Params4bit(
        weight.to(dtype, copy=True),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
        module=module,
    ).to("cpu")
    if os.environ.get("LOWRANK_ISA"):
        module.support_avx512bf16_for_cpu = (
            False  # the instruction set that everybody is restricted to lacks it
        )
    state = module.weight.quant_state
    held = bitsandbytes_tensors(module.weight.data, state)
    return Layer(
        "bitsandbytes",
        module,
        dtype,
        exact_bitsandbytes(held, weight.shape),
        sum(t.numel() * t.element_size() for t in held),
    )


def bitsandbytes_tensors(packed: Tensor, state) -> tuple[Tensor, ...]:
    """The tensors of a double-quantized weight: packed, absmax, nested absmax, nested map, offset,
    code.
    """
    return packed, state.absmax, state.state2.absmax, state.state2.code, state.offset, state.code


def exact_bitsandbytes(tensors: tuple[Tensor, ...], shape: torch.Size) -> Tensor:
    """The float64 weight [N, K] of bitsandbytes' tensors."""
    packed, absmax, nested_absmax, nested_map, offset, code = tensors
    return decode_bitsandbytes(
        packed,
        absmax,
        nested_absmax,
        nested_map,
        offset,
        code,
        shape,
        BLOCK_SIZE,
        nested_block_size=256,
    )


LAYERS: dict[str, Callable[[Tensor, torch.dtype], Layer]] = {
    "torch": dense_layer,
    "lowrank": lowrank_layer,
    "bitsandbytes": bitsandbytes_layer,
}
