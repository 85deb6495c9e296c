"""The LoRA operators as functions: check every argument, then call `torch.ops.lowrank`.

Letters and tensors are as in `schema.py`: E adapters of rank R, A [E, R, K], B [E, N, R].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank.errors import ConfigError, DataError, DtypeError, ShapeError

from . import dispatch
from .checks import (
    ACTIVATIONS,
    check_constant,
    check_device,
    check_dtype,
    check_int,
    check_number,
    check_tensors,
    check_weight,
    names_of,
    shape_of,
    value_of,
)

Groups = tuple[Tensor, Tensor]  # order, offsets: as group_rows makes them


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    codebook: Tensor | None,
    bias: Tensor | None,
    block_size: int,
    A: Tensor,
    B: Tensor,
    scale: float,
    groups: Groups | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + b + scale * drop(x) A[e]ᵀ B[e]ᵀ: [..., K] -> [..., N] in the dtype of x.

    `weight` is dense [N, K] of the dtype of x, with None for absmax, absmax_scale and codebook; or
    the packed codes that these belong to; or None: then y is the branch alone. A and B are float32
    or of the dtype of x. `groups` says which rows of x have which adapter; None: all have the only
    one. `group_rows` makes it: on a CPU wrong numbers in it are an error; a GPU is not waited for,
    and takes them for addresses. Dropout keeps an element with probability 1 - p, as `seed`
    decides: an int64 scalar on the device of x, None iff p = 0; the same seed, the same mask.
    Differentiable once in x, bias, A and B; x is kept for the backward only if A is trained.
    """
    if codebook is not None and groups is None and seed is None:
        args = (
            x, weight, absmax, absmax_scale, codebook, bias, block_size, A, B, scale, None, None,
            p, None,
        )  # fmt: skip
        kernel = dispatch.straight("lora_linear", args, "dtt?t?iddf??f?")
        # a kernel is found only where all that is checked below holds, but this
        if kernel is not None and A.dtype == B.dtype == torch.float32 and (
            bias is None or bias.dtype == x.dtype
        ):
            return kernel(*args)[0]
    check_tensors(x=x, A=A, B=B)
    if x.dim() == 0:
        raise ShapeError("x: expected [..., K]; got a scalar")
    check_dtype("x", x, ACTIVATIONS)
    M, N, K = math.prod(x.shape[:-1]), *_check_adapters(A, B, x)
    if x.shape[-1] != K:
        raise ShapeError(f"x: expected [..., K={K}], as A has it; got {shape_of(x)}")
    _check_base(x, weight, absmax, absmax_scale, codebook, block_size, N, K)
    if bias is not None:
        check_tensors(bias=bias)
        if weight is None:
            raise ConfigError("bias: expected None without a weight; got one; add it to the base")
        if bias.shape != (N,):
            raise ShapeError(f"bias: expected [N={N}]; got {shape_of(bias)}")
        check_dtype("bias", bias, (x.dtype,))
        check_device("bias", bias, x.device)
    check_number("scale", scale)
    order, offsets = _check_groups(groups, A.shape[0], M, x.device)
    _check_dropout(p, seed, x.device)
    return dispatch.call(
        "lora_linear", x, weight, absmax, absmax_scale, codebook, bias, block_size, A, B, scale,
        order, offsets, p, seed,
    )[0]  # fmt: skip


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    codebook: Tensor | None,
    block_size: int,
    A: Tensor,
    B: Tensor,
    scale: float,
    groups: Groups | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [..., K], dA, dB) for dy [..., N]; what `needs` says is not needed comes back as [0].

    x [..., K] is looked at for dA alone and h [M, R], the operator's second result, for dB alone.
    """
    check_tensors(dy=dy, x=x, h=h, A=A, B=B)
    check_dtype("dy", dy, ACTIVATIONS)
    N, K = _check_adapters(A, B, dy)
    if dy.dim() == 0 or dy.shape[-1] != N:
        raise ShapeError(f"dy: expected [..., N={N}]; got {shape_of(dy)}")
    M = math.prod(dy.shape[:-1])
    if not isinstance(needs, list | tuple) or [type(need) for need in needs] != [bool] * 3:
        raise ConfigError(f"needs: expected three booleans, for dx, dA and dB; got {needs!r:.80}")
    if needs[1] and x.shape != (*dy.shape[:-1], K):
        raise ShapeError(f"x: expected {[*dy.shape[:-1], K]}, as dy has it; got {shape_of(x)}")
    if needs[2] and h.shape != (M, A.shape[1]):
        raise ShapeError(f"h: expected {[M, A.shape[1]]}; got {shape_of(h)}")
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    for name, tensor, dtype, need in (("x", x, dy.dtype, needs[1]), ("h", h, wide, needs[2])):
        if need:
            check_dtype(name, tensor, (dtype,))
        check_device(name, tensor, dy.device)
    _check_base(dy, weight, absmax, absmax_scale, codebook, block_size, N, K)
    check_number("scale", scale)
    order, offsets = _check_groups(groups, A.shape[0], M, dy.device)
    _check_dropout(p, seed, dy.device)
    return torch.ops.lowrank.lora_linear_backward(
        dy, x, h, weight, absmax, absmax_scale, codebook, block_size, A, B, scale, order, offsets,
        p, seed, list(needs),
    )  # fmt: skip


def group_rows(adapter_ids: Tensor, E: int) -> Groups:
    """(order, offsets) of `lora_linear` for rows whose adapters are `adapter_ids` [M], -1 for none.

    order int32 [M] are the row numbers sorted by adapter, stable; offsets int32 [E + 1] where each
    adapter's begin. Nothing waits for the device: only on a CPU is a number that is no adapter's
    an error, elsewhere its row has none.
    """
    check_tensors(adapter_ids=adapter_ids)
    check_int("E", E, least=1)
    if adapter_ids.dim() != 1:
        raise ShapeError(f"adapter_ids: expected [M]; got {shape_of(adapter_ids)}")
    check_dtype("adapter_ids", adapter_ids, (torch.int64, torch.int32))
    wrong = (adapter_ids < -1) | (adapter_ids >= E)
    if adapter_ids.device.type == "cpu" and not torch.compiler.is_compiling() and wrong.any():
        raise DataError(
            f"adapter_ids: expected -1 for none or below E={E}; got {adapter_ids[wrong][0].item()}"
        )
    ids, order = adapter_ids.masked_fill(wrong, -1).sort(stable=True)
    firsts = torch.arange(E + 1, dtype=ids.dtype, device=ids.device)
    return order.int(), torch.searchsorted(ids, firsts, out_int32=True)


def _check_adapters(A: Tensor, B: Tensor, x: Tensor) -> tuple[int, int]:
    """(N, K) of A [E, R, K] and B [E, N, R]."""
    if A.dim() != 3 or B.dim() != 3 or A.shape[:2] != (B.shape[0], B.shape[2]) or 0 in A.shape[:2]:
        raise ShapeError(
            f"A, B: expected [E, R, K] and [E, N, R] with E, R >= 1; "
            f"got {shape_of(A)} and {shape_of(B)}"
        )
    allowed = tuple(dict.fromkeys((torch.float32, x.dtype)))
    for name, tensor in (("A", A), ("B", B)):
        check_dtype(name, tensor, allowed)
        check_device(name, tensor, x.device)
    if A.dtype != B.dtype:
        raise DtypeError(f"A, B: expected one dtype, {names_of(allowed)}; got {A.dtype}, {B.dtype}")
    return B.shape[1], A.shape[2]


def _check_base(
    x: Tensor,
    weight: Tensor | None,
    absmax: Tensor | None,
    absmax_scale: Tensor | None,
    codebook: Tensor | None,
    block_size: int,
    N: int,
    K: int,
) -> None:
    """What is multiplied beside the branch; `x` is x, or dy of its dtype."""
    check_int("block_size", block_size)
    if weight is None or codebook is None or absmax is None:
        given = {"absmax": absmax, "absmax_scale": absmax_scale, "codebook": codebook}
        for name, tensor in given.items():
            if tensor is not None:
                check_tensors(**{name: tensor})
                raise ConfigError(
                    f"{name}: expected None without packed codes and all that belongs to them; "
                    f"got a tensor of {shape_of(tensor)}"
                )
    if weight is None:
        return
    check_tensors(weight=weight)
    if codebook is not None and absmax is not None:
        check_weight(weight, absmax, absmax_scale, codebook, K, block_size)
        if weight.shape[0] != N:
            raise ShapeError(f"packed: expected {N} rows, as B has them; got {shape_of(weight)}")
    elif weight.shape != (N, K):
        raise ShapeError(f"weight: expected [N={N}, K={K}]; got {shape_of(weight)}")
    else:
        check_dtype("weight", weight, (x.dtype,))
        check_constant("weight", weight)
    check_device("weight", weight, x.device)


def _check_groups(
    groups: Groups | None, E: int, M: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    if groups is None:
        if E != 1:
            raise ConfigError(f"groups: expected them for E={E} adapters; got None; see group_rows")
        return None, None
    if not isinstance(groups, list | tuple) or len(groups) != 2:
        raise ConfigError(f"groups: expected (order, offsets); got {value_of(groups)}")
    order, offsets = groups
    check_tensors(order=order, offsets=offsets)
    for name, tensor, length in (("order", order, M), ("offsets", offsets, E + 1)):
        if tensor.shape != (length,):
            raise ShapeError(f"{name}: expected [{length}]; got {shape_of(tensor)}")
        check_dtype(name, tensor, (torch.int32,))
        check_device(name, tensor, device)
    return order, offsets


def _check_dropout(p: float, seed: Tensor | None, device: torch.device) -> None:
    check_number("p", p)
    if not 0 <= p < 1:
        raise ConfigError(f"p: expected a probability in [0, 1); got {p}")
    if p > 0 and seed is None:  # in words that a compiler takes of a p that it does not know
        raise ConfigError(f"seed: expected an int64 scalar with p={p}; got None")
    if p == 0 and seed is not None:
        raise ConfigError("seed: expected None with p=0; got a tensor")
    if seed is not None:
        check_tensors(seed=seed)
        if seed.dim() != 0:
            raise ShapeError(f"seed: expected a scalar; got {shape_of(seed)}")
        check_dtype("seed", seed, (torch.int64,))
        check_device("seed", seed, device)
