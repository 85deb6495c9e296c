"""What the functions ask of their arguments: one line each that names, expects, got and helps."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.errors import ConfigError, DtypeError, ShapeError

ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def check_weight(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int,
) -> None:
    check_tensors(packed=packed, absmax=absmax, codebook=codebook)
    check_block_size(block_size)
    check_int("K", K)
    if packed.dim() != 2 or packed.shape[1] != (K + 31) // 32 * 16 or 0 in (K, packed.shape[0]):
        raise ShapeError(
            f"packed: expected [N, {(K + 31) // 32 * 16}] with N, K >= 1, for K={K}; "
            f"got {shape_of(packed)}"
        )
    N, blocks, device = packed.shape[0], -(-K // block_size), packed.device
    if absmax.shape != (N, blocks):
        raise ShapeError(
            f"absmax: expected [N={N}, {blocks}] for K={K}, block size {block_size}; "
            f"got {shape_of(absmax)}"
        )
    check_dtype("packed", packed, (torch.uint8,))
    if absmax_scale is None:
        if absmax.dtype != torch.float32:
            raise DtypeError(
                f"absmax: expected float32, or uint8 with absmax_scale; got {absmax.dtype} alone"
            )
    else:
        check_tensors(absmax_scale=absmax_scale)
        if absmax_scale.shape != (N, 2):
            raise ShapeError(f"absmax_scale: expected [N={N}, 2]; got {shape_of(absmax_scale)}")
        check_dtype("absmax", absmax, (torch.uint8,))
        check_dtype("absmax_scale", absmax_scale, (torch.float32,))
        check_constant("absmax_scale", absmax_scale)
        check_device("absmax_scale", absmax_scale, device)
    check_codebook(codebook, N, device)
    check_constant("absmax", absmax)
    check_device("absmax", absmax, device)


def check_codebook(codebook: Tensor, N: int, device: torch.device) -> None:
    if codebook.dim() != 2 or codebook.shape[1] != 16 or codebook.shape[0] not in (1, N):
        raise ShapeError(f"codebook: expected [1, 16] or [N={N}, 16]; got {shape_of(codebook)}")
    check_constant("codebook", codebook)
    check_dtype("codebook", codebook, (torch.float32,))
    check_device("codebook", codebook, device)


def check_activation(name: str, x: Tensor, packed: Tensor) -> None:
    check_dtype(name, x, ACTIVATIONS)
    check_device(name, x, packed.device)


def check_tensors(**tensors: Tensor) -> None:
    """Every one is a tensor of rows and columns in memory: not None, a list, sparse or nested."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{name}: expected a tensor; got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else tensor.layout
            raise DtypeError(f"{name}: expected a dense tensor; got a {kind} one; use .to_dense()")


def check_int(name: str, value: int, least: int = 0) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}: expected a whole number >= {least}; got {value_of(value)}")


def check_sizes(**sizes: int) -> None:
    """Every one is a whole number of any kind, and at least 1."""
    if not all(hasattr(size, "__index__") and size >= 1 for size in sizes.values()):
        got = ", ".join(value_of(size) for size in sizes.values())
        raise ShapeError(f"{', '.join(sizes)}: expected at least 1; got {got}")


def check_number(name: str, value: float) -> None:
    if not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise ConfigError(f"{name}: expected a number; got {value_of(value)}")


def check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ConfigError(
            f"{name}: a quantized weight is frozen; got requires_grad=True; detach it"
        )


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        raise DtypeError(f"{name}: expected {names_of(allowed)}; got {tensor.dtype}")


def check_float(name: str, dtype: torch.dtype) -> None:
    """A dtype in which weights and activations are computed."""
    if not isinstance(dtype, torch.dtype) or dtype not in ACTIVATIONS:
        raise DtypeError(
            f"{name}: expected a floating-point dtype, {names_of(ACTIVATIONS)}; "
            f"got {value_of(dtype)}"
        )


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ConfigError(
            f"{name}: expected on {device}, with the rest; got {tensor.device}; move it with .to()"
        )


def check_block_size(block_size: int) -> None:
    if not isinstance(block_size, int | torch.SymInt) or block_size not in BLOCK_SIZES:
        raise ConfigError(
            f"block_size: expected a power of two from 32 to 4096; got {value_of(block_size)}"
        )


def names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(d) for d in dtypes)


def value_of(value: object) -> str:
    """What was given where a number was asked for, in one line."""
    plain = isinstance(value, int | float | str | torch.dtype) or value is None
    return repr(value) if plain else f"a {type(value).__name__}"


def shape_of(tensor: Tensor) -> str:
    return str(list(tensor.shape))
