"""The packages of a comparison: how each is imported, and what its tensors stand for."""

from __future__ import annotations

import importlib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.installed import missing as missing
from benchmarks.oracle import decode_bitsandbytes, decode_lowrank, decode_torchao

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SIZE = 64
TORCHAO_GROUP = 256  # blocks that share a scale of scales, as in bitsandbytes


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, what packages log and warn about while they load or compile is not shown."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def bitsandbytes():
    """The package, quietly, and with the `kernels` it looks for being Hugging Face's if installed.

    From the root of a checkout, `import kernels` would find lowrank's folder of that name.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if Path(entry or ".").resolve() != ROOT]
    try:
        with quiet():
            import bitsandbytes as package
    finally:
        sys.path[:] = before
    return package


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile of a function, as one graph."""
    with quiet():  # what torch deprecates of its own
        importlib.import_module("torch._inductor.compile_fx")
    # once for each dtype, one row, more rows, training, and memory that is poisoned or not
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, fullgraph=True)


def forget_compiled() -> None:
    """Let the next weight be compiled for its own shape, not for any shape."""
    torch.compiler.reset()


def torchao_nf4(weight: Tensor):
    """torchao's NF4Tensor of a weight whose blocks fill their groups."""
    with quiet():
        from torchao.quantization import NF4Tensor
    return NF4Tensor.from_tensor(weight, BLOCK_SIZE, TORCHAO_GROUP)


def torchao_bytes(held) -> int:
    """Bytes of all tensors inside an NF4Tensor."""
    names, _ = held.__tensor_flatten__()
    return sum(getattr(held, name).nbytes for name in names)


def exact_torchao(held) -> Tensor:
    """The float64 weight [N, K] of an NF4Tensor."""
    return decode_torchao(
        held.quantized_data,
        held.quantized_scalers,
        held.quantization_factor,
        held.scaler_mean,
        held.nf4,
        held.shape,
        BLOCK_SIZE,
        TORCHAO_GROUP,
    )


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
