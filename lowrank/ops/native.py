"""Opens the native libraries of `lowrank/lib` through ctypes, and says why where it cannot.

`FUNCTIONS` and `CUDA_FUNCTIONS` are what they export, kept as in `csrc/lowrank.h` and
`csrc/lowrank_cuda.h`. An absent library, or
one of another ABI, is a reason that `lowrank.ops.explain` prints; it is never an import error.
The environment's LOWRANK_ISA=generic, avx2, avx512 or neon forces an instruction set.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

# First: its OpenMP runtime is then the only one in the process; ours would bring another.
import torch

from lowrank.errors import BackendError, ConfigError

from .adamw8bit import rows_and_columns

ABI = 7
ISAS = ("generic", "avx2", "avx512", "neon")  # enum lowrank_isa
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum lowrank_dtype

_LIB = Path(__file__).resolve().parents[1] / "lib"
# packed, absmax, absmax_scale, codebook, T
_WEIGHT = (c_void_p, c_void_p, c_void_p, c_void_p, c_int64)

_refused: dict[str, str] = {}  # by load_cpu
_loading = threading.Lock()  # instruction sets are tried by using them, in all threads


class Moments8bitTensor(ctypes.Structure):
    """struct lowrank_moments8bit_tensor; without a second moment v and v_scale are None."""

    _fields_ = [
        *((name, c_void_p) for name in ("p", "g", "m", "v", "m_scale", "v_scale")),
        ("rows", c_int64),
        ("cols", c_int64),
        ("dtype", c_int32),
    ]


class Adamw8bitCoefficients(ctypes.Structure):
    """struct lowrank_adamw8bit_coefficients, in the order of `adamw8bit.Coefficients`."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in ("beta1", "rest1", "beta2", "rest2", "decay", "rate", "root2", "eps")
    ]


class Lion8bitCoefficients(ctypes.Structure):
    """struct lowrank_lion8bit_coefficients, in the order of `lion8bit.Coefficients`."""

    _fields_ = [
        (name, ctypes.c_float) for name in ("beta1", "rest1", "beta2", "rest2", "decay", "rate")
    ]


class Rows(ctypes.Structure):
    """struct lowrank_rows."""

    _fields_ = [("order", c_void_p), ("first", c_int64), ("count", c_int64), ("M", c_int64)]


class Dropout(ctypes.Structure):
    """struct lowrank_dropout."""

    _fields_ = [("seed", c_int64), ("threshold", ctypes.c_uint32), ("inverse", ctypes.c_float)]


class Lora(ctypes.Structure):
    """struct lowrank_lora."""

    _fields_ = [
        *((name, c_void_p) for name in ("A", "B", "h")),
        ("R", c_int64),
        ("scale", ctypes.c_float),
        ("dropout", c_void_p),
    ]


class Heads(ctypes.Structure):
    """struct lowrank_heads."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("B", "S", "heads", "D")),
        *((name, c_int64) for name in ("stride_b", "stride_s", "stride_head")),
    ]


class Angles(ctypes.Structure):
    """struct lowrank_angles."""

    _fields_ = [
        *((name, c_void_p) for name in ("cos", "sin")),
        *((name, c_int64) for name in ("B", "turned")),
        ("dtype", c_int32),
    ]


class Gate(ctypes.Structure):
    """struct lowrank_gate."""

    _fields_ = [
        *((name, c_void_p) for name in ("gate", "up")),
        *((name, c_int64) for name in ("M", "I", "gate_stride", "up_stride")),
        *((name, c_int32) for name in ("dtype", "activation")),
    ]


class Product(ctypes.Structure):
    """struct lowrank_product."""

    _fields_ = [
        *((name, c_void_p) for name in ("packed", "absmax", "absmax_scale", "codebook")),
        *((name, c_int64) for name in ("codebook_rows", "N", "block_size")),
        *((name, c_void_p) for name in ("bias", "A", "B")),
        ("R", c_int64),
        ("scale", ctypes.c_float),
    ]


class Newest(ctypes.Structure):
    """struct lowrank_newest."""

    _fields_ = [
        *((name, c_void_p) for name in ("cos", "sin", "mask")),
        *((name, c_int64) for name in ("cos_row", "sin_row", "mask_row")),
        *((name, c_int64) for name in ("B", "heads", "kv_heads", "D", "rotary")),
        *((name, c_int64) for name in ("capacity", "position", "first")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


# Every function returns int32; those that compute, a status.
FUNCTIONS = {
    "lowrank_abi": (),
    "lowrank_isa_in_use": (),
    "lowrank_isa_usable": (c_int32,),
    "lowrank_use_isa": (c_int32,),
    # weight, dtype, N, K, stride, codebook, T, block_size, packed, absmax, threads
    "lowrank_codebook_quantize": (
        c_void_p, c_int32, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p,
        c_void_p, c_int32,
    ),
    # weight, N, K, block_size, n0, n1, out, dtype, threads
    "lowrank_codebook_dequantize": (
        *_WEIGHT, c_int64, c_int64, c_int64, c_int64, c_int64, c_void_p, c_int32, c_int32,
    ),
    # weight, N, K, block_size, k0, k1, out, dtype, threads
    "lowrank_codebook_dequantize_columns": (
        *_WEIGHT, c_int64, c_int64, c_int64, c_int64, c_int64, c_void_p, c_int32, c_int32,
    ),
    # x, dtype, M, weight, N, K, block_size, bias, y, threads
    "lowrank_codebook_linear": (
        c_void_p, c_int32, c_int64, *_WEIGHT, c_int64, c_int64, c_int64, c_void_p, c_void_p,
        c_int32,
    ),
    # the same
    "lowrank_codebook_linear_int16": (
        c_void_p, c_int32, c_int64, *_WEIGHT, c_int64, c_int64, c_int64, c_void_p, c_void_p,
        c_int32,
    ),
    # x, dtype, M, weight, N, K, block_size, bias, lora, y, threads
    "lowrank_codebook_lora_linear": (
        c_void_p, c_int32, c_int64, *_WEIGHT, c_int64, c_int64, c_int64, c_void_p, c_void_p,
        c_void_p, c_int32,
    ),
    # dy, x, M, weight, N, K, block_size, lora, dx, add, dA, dB, threads
    "lowrank_codebook_lora_backward": (
        c_void_p, c_void_p, c_int64, *_WEIGHT, c_int64, c_int64, c_int64, c_void_p, c_void_p,
        c_int32, c_void_p, c_void_p, c_int32,
    ),
    # x, dtype, M, K, products, their number, ys, threads
    "lowrank_codebook_products": (
        c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int32,
    ),
    # newest, q, k, v, strides, dtype, keys, values, out, threads
    "lowrank_attend_newest": (
        c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_void_p, c_void_p,
        c_int32,
    ),
    # logits, labels, T, V, loss, gradient, threads
    "lowrank_softmax_cross_entropy": (
        c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int32, c_int32,
    ),
    # x, dtype, K, stride, rows, dropout, out, threads
    "lowrank_gather_rows": (
        c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int32,
    ),
    # values, K, rows, dropout, accumulate, out, dtype, stride, threads
    "lowrank_scatter_rows": (
        c_void_p, c_int64, c_void_p, c_void_p, c_int32, c_void_p, c_int32, c_int64, c_int32,
    ),
    # x, dtype, M, H, weight, weight's dtype, plus_one, eps, y, rstd, threads
    "lowrank_rms_norm": (
        c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int32, c_int32, ctypes.c_float, c_void_p,
        c_void_p, c_int32,
    ),
    # dy, x, dtype, M, H, weight, weight's dtype, plus_one, rstd, dx, dweight, threads
    "lowrank_rms_norm_backward": (
        c_void_p, c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int32, c_int32, c_void_p,
        c_void_p, c_void_p, c_int32,
    ),
    # heads, dtype, angles, back, y, threads
    "lowrank_rotate": (c_void_p, c_int32, c_void_p, c_int32, c_void_p, c_int32),
    # gate, y, threads
    "lowrank_gated": (c_void_p, c_void_p, c_int32),
    # gate, dy, dgate, dup, threads
    "lowrank_gated_backward": (c_void_p, c_void_p, c_void_p, c_void_p, c_int32),
    # blocks, their number, newest, keys, values, x, dtype, H, threads
    "lowrank_blocks": (
        c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_int64, c_int32,
    ),
    # tensors, their number, m_map, v_map, coefficients, threads
    "lowrank_adamw8bit_step": (c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int32),
    # tensors, their number, m_map, coefficients, threads
    "lowrank_lion8bit_step": (c_void_p, c_int64, c_void_p, c_void_p, c_int32),
}  # fmt: skip

CUDA_FUNCTIONS = {
    "lowrank_cuda_abi": (),
    "lowrank_cuda_ready": (),
    "lowrank_cuda_message": (c_int32,),
    # weight, dtype, N, K, stride, codebook, T, block_size, packed, absmax, device, stream
    "lowrank_cuda_codebook_quantize": (
        c_void_p, c_int32, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p,
        c_void_p, c_int32, c_void_p,
    ),
    # weight, N, K, block_size, out, dtype, device, stream
    "lowrank_cuda_codebook_dequantize": (
        *_WEIGHT, c_int64, c_int64, c_int64, c_void_p, c_int32, c_int32, c_void_p,
    ),
    # x, dtype, M, stride, weight, N, K, block_size, bias, y, device, stream
    "lowrank_cuda_codebook_linear": (
        c_void_p, c_int32, c_int64, c_int64, *_WEIGHT, c_int64, c_int64, c_int64, c_void_p,
        c_void_p, c_int32, c_void_p,
    ),
    # tensors, their number, m_map, v_map, coefficients, device, stream
    "lowrank_cuda_adamw8bit_step": (
        c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int32, c_void_p,
    ),
}  # fmt: skip

_STATUS = {
    1: "an argument was refused",
    2: "this processor, or this build, lacks the instruction set",
    3: "out of memory",
}


@cache
def load_cpu() -> ctypes.CDLL | str:
    """The CPU library, its signatures set, or the reason why there is none."""
    with _loading:  # a cache alone would let every thread that comes early load it
        return _load_cpu()


@cache
def _load_cpu() -> ctypes.CDLL | str:
    library = _open("liblowrank_cpu.so", "lowrank_abi", FUNCTIONS, "a C++ compiler")
    if isinstance(library, str):
        return library
    asked = os.environ.get("LOWRANK_ISA")
    if asked and asked not in ISAS:
        return f"LOWRANK_ISA: expected one of {', '.join(ISAS)}; got {asked!r}"
    if asked and library.lowrank_use_isa(ISAS.index(asked)):
        return f"LOWRANK_ISA={asked}: {_STATUS[2]}; unset it"
    if not asked:
        _try_isas(library)
    return library


@cache
def load_cuda() -> ctypes.CDLL | str:
    """The CUDA library where a device can run it, or the reason why not."""
    library = _open("liblowrank_cuda.so", "lowrank_cuda_abi", CUDA_FUNCTIONS, "nvcc")
    if isinstance(library, str):
        return library
    library.lowrank_cuda_message.restype = ctypes.c_char_p
    status = library.lowrank_cuda_ready()
    if status:
        return f"CUDA cannot be used: {library.lowrank_cuda_message(status).decode()}"
    return library


def moments8bit_tensors(
    params: Sequence[torch.Tensor], *lists: Sequence[torch.Tensor]
) -> ctypes.Array[Moments8bitTensor]:
    """The structs of contiguous parameters, their gradients, m, m_scale and perhaps v, v_scale."""
    made = (Moments8bitTensor * len(params))()
    for p, *tensors, entry in zip(params, *lists, made, strict=True):
        entry.p = p.data_ptr()
        for name, tensor in zip(("g", "m", "m_scale", "v", "v_scale"), tensors, strict=False):
            setattr(entry, name, tensor.data_ptr())
        entry.rows, entry.cols = rows_and_columns(p.shape)
        entry.dtype = DTYPES[p.dtype]
    return made


def isa() -> str:
    """The instruction set in use."""
    return ISAS[_cpu().lowrank_isa_in_use()]


def usable_isas() -> tuple[str, ...]:
    """Those that this processor and this build can run, the widest last."""
    return tuple(name for i, name in enumerate(ISAS) if _cpu().lowrank_isa_usable(i) == 0)


def refused_isas() -> dict[str, str]:
    """Those that run here and are wrong, with the reason: not used unless asked for by name."""
    load_cpu()
    return dict(_refused)


def use_isa(name: str) -> None:
    """Run the CPU kernels of another instruction set from now on."""
    if name not in ISAS:
        raise ConfigError(f"isa: expected one of {', '.join(ISAS)}; got {name!r}")
    check(_cpu().lowrank_use_isa(ISAS.index(name)), f"use_isa({name!r})")


def check(status: int, what: str) -> None:
    """Raise BackendError unless a native function returned 0."""
    if status:
        raise BackendError(f"{what}: {_STATUS.get(status, f'status {status}')}")


def _try_isas(library: ctypes.CDLL) -> None:
    """Leave in use the widest instruction set that gives what the generic one gives."""
    from . import trial  # here, as it takes the structures from this file

    for isa in range(library.lowrank_isa_in_use(), 0, -1):
        if library.lowrank_isa_usable(isa) == 0:
            wrong = trial.wrong_function(library, isa)
            if wrong is None:
                return
            reason = f"its {wrong} is not the generic one's; LOWRANK_ISA={ISAS[isa]} forces it"
            _refused[ISAS[isa]] = reason
    library.lowrank_use_isa(0)


def _open(file: str, abi_name: str, functions: dict[str, tuple], builder: str) -> ctypes.CDLL | str:
    """The library with its signatures set, or the reason why there is none."""
    path = _LIB / file
    if not path.exists():
        return f"{file} is not built; install {builder} and reinstall lowrank"
    try:
        if _is_cut_short(path):
            return f"{path} is cut short: was the disk full? reinstall lowrank"
        library = ctypes.CDLL(str(path))
        # First: a stale library may lack functions as well, and its number is what tells so.
        abi = getattr(library, abi_name)()
        if abi != ABI:
            return f"{path}: expected ABI {ABI}; got {abi}; reinstall lowrank"
        for name, argtypes in functions.items():
            function = getattr(library, name)
            function.argtypes, function.restype = argtypes, c_int32
    except (OSError, AttributeError) as error:
        return f"{path} cannot be used: {error}; reinstall lowrank"
    return library


def _is_cut_short(path: Path) -> bool:
    """Whether a library ends before its table of sections does: to open it would end the process.

    That table is the last thing in the file.   System V ABI, ELF-64 header.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if not header.startswith(b"\x7fELF\x02\x01"):
        return False  # 64 bits, little-endian, or left to dlopen
    offset = int.from_bytes(header[40:48], "little")
    size, count = (int.from_bytes(header[at : at + 2], "little") for at in (58, 60))
    return path.stat().st_size < max(len(header), offset + size * count)


def _cpu() -> ctypes.CDLL:
    library = load_cpu()
    if isinstance(library, str):
        raise BackendError(library)
    return library
