"""The operators as functions: check every argument, then call `torch.ops.lowrank`.

The checks read shapes and dtypes only, so a compiler evaluates them once while tracing. Letters and
the tensors of a weight are as in `schema.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowrank.errors import ConfigError, DtypeError, ShapeError

from . import dispatch
from .adamw8bit import ZERO_OF_M, ZERO_OF_V, scale_shape
from .checks import (
    ACTIVATIONS,
    WEIGHTS,
    check_activation,
    check_block_size,
    check_codebook,
    check_device,
    check_dtype,
    check_float,
    check_int,
    check_number,
    check_tensors,
    check_weight,
    shape_of,
    value_of,
)


def codebook_quantize(
    weight: Tensor, codebook: Tensor, block_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Packed codes and float32 absmax of weight [N, K]; `codebook` is float32 [1, 16] or [N, 16].

    NaN or inf in a block makes its absmax NaN or inf: `quant` refuses such a weight.
    """
    check_tensors(weight=weight, codebook=codebook)
    if weight.dim() != 2 or weight.numel() == 0:
        raise ShapeError(f"weight: expected [N, K] with N, K >= 1; got {shape_of(weight)}")
    check_dtype("weight", weight, WEIGHTS)
    check_block_size(block_size)
    check_codebook(codebook, weight.shape[0], weight.device)
    return dispatch.call("codebook_quantize", weight, codebook, block_size)


def codebook_dequantize(
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight [N, K] in `dtype`: one float32 product, rounded once."""
    check_float("dtype", dtype)
    check_weight(packed, absmax, absmax_scale, codebook, K, block_size)
    return dispatch.call(
        "codebook_dequantize", packed, absmax, absmax_scale, codebook, K, block_size, dtype
    )


def codebook_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    bias: Tensor | None = None,
    block_size: int = 64,
) -> Tensor:
    """y = x Wᵀ + b: [..., K] -> [..., N] in the dtype of x, accumulated in float32.

    Differentiable, twice too, in x and bias; `bias` [N] has the dtype of x.
    """
    operands = (x, packed, absmax, absmax_scale, codebook, bias, block_size)
    kernel = dispatch.straight("codebook_linear", operands, "dtt?t?i")
    if kernel is not None and (bias is None or bias.dtype == x.dtype):
        return kernel(*operands)
    check_tensors(x=x)
    if x.dim() == 0:
        raise ShapeError("x: expected [..., K]; got a scalar")
    check_weight(packed, absmax, absmax_scale, codebook, x.shape[-1], block_size)
    check_activation("x", x, packed)
    if bias is not None:
        check_tensors(bias=bias)
        if bias.shape != packed.shape[:1]:
            raise ShapeError(f"bias: expected [N={packed.shape[0]}]; got {shape_of(bias)}")
        if bias.dtype != x.dtype:
            raise DtypeError(
                f"bias: expected the dtype of x, {x.dtype}; got {bias.dtype}; cast one of them"
            )
        check_device("bias", bias, packed.device)
    return dispatch.call("codebook_linear", *operands)


def codebook_linear_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    codebook: Tensor,
    K: int,
    block_size: int = 64,
) -> Tensor:
    """dx = dy W: [..., N] -> [..., K] in the dtype of dy, accumulated in float32."""
    check_tensors(dy=dy)
    check_weight(packed, absmax, absmax_scale, codebook, K, block_size)
    if dy.dim() == 0 or dy.shape[-1] != packed.shape[0]:
        raise ShapeError(f"dy: expected [..., N={packed.shape[0]}]; got {shape_of(dy)}")
    check_activation("dy", dy, packed)
    return dispatch.call(
        "codebook_linear_dx", dy, packed, absmax, absmax_scale, codebook, K, block_size
    )


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy of softmax(x Wᵀ) against labels, without ever holding all logits.

    x [..., H], frozen weight [V, H], labels int64 [...] with -100 where nothing is to be predicted.
    Returns a float32 scalar, differentiable once in x; the gradient is formed in the forward.
    """
    check_tensors(x=x, weight=weight, labels=labels)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ShapeError(
            "x, weight: expected [..., H] and [V, H] with V, H >= 1; "
            f"got {shape_of(x)} and {shape_of(weight)}"
        )
    if labels.shape != x.shape[:-1]:
        raise ShapeError(
            f"labels: expected {list(x.shape[:-1])}, one for each row of x; got {shape_of(labels)}"
        )
    check_dtype("x", x, ACTIVATIONS)
    check_dtype("weight", weight, ACTIVATIONS)
    check_dtype("labels", labels, (torch.int64,))
    check_device("weight", weight, x.device)
    check_device("labels", labels, x.device)
    with_dx = torch.is_grad_enabled() and x.requires_grad
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ConfigError(
            "weight: expected a frozen head, as no gradient is formed for it; got requires_grad; "
            "freeze it with weight.requires_grad_(False) or use torch.nn.functional.cross_entropy"
        )
    x = x.reshape(-1, x.shape[-1])
    return dispatch.call("linear_cross_entropy", x, weight, labels.reshape(-1), with_dx)[0]


def adamw8bit_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    m_scale: Sequence[Tensor],
    v: Sequence[Tensor],
    v_scale: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Take AdamW's step number `step` (1 is the first) in place, over all tensors at once.

    A parameter [N, ...] of C columns in all has uint8 codes `m` and `v` of its shape and float32
    `m_scale` and `v_scale` [N, ceil(C / 256)]; one of fewer than two dimensions is a single row.
    The state of a new parameter is `adamw8bit_state`. A gradient that is not finite leaves its
    block of the state not finite too. The parameters move in float32 whatever their dtype.
    """
    _check_step(params, grads, {"m": m, "m_scale": m_scale, "v": v, "v_scale": v_scale})
    _check_step_numbers(lr=lr, eps=eps, weight_decay=weight_decay, beta1=beta1, beta2=beta2)
    check_int("step", step)
    if step < 1:
        raise ConfigError(f"step: expected 1 for the first step, then 2, ...; got {step}")
    with torch.no_grad():
        torch.ops.lowrank.adamw8bit_step(
            list(params), list(grads), list(m), list(m_scale), list(v), list(v_scale),
            lr, beta1, beta2, eps, weight_decay, step,
        )  # fmt: skip


def lion8bit_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    m: Sequence[Tensor],
    m_scale: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """Take a step of Lion in place, over all tensors at once.

    The state is the first half of AdamW's: `adamw8bit_state(p)[:2]` is that of a new parameter. A
    gradient that is not finite makes its element of the parameter NaN at once, and its block of the
    state not finite.
    """
    _check_step(params, grads, {"m": m, "m_scale": m_scale})
    _check_step_numbers(lr=lr, weight_decay=weight_decay, beta1=beta1, beta2=beta2)
    with torch.no_grad():
        torch.ops.lowrank.lion8bit_step(
            list(params), list(grads), list(m), list(m_scale), lr, beta1, beta2, weight_decay
        )


def _check_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], state: Mapping[str, Sequence[Tensor]]
) -> None:
    """Of every parameter: its gradient, its codes (m, v), the scales of those."""
    lists = {"grads": grads, **state}
    for name, tensors in {"params": params, **lists}.items():
        if not isinstance(tensors, list | tuple):
            raise ConfigError(f"{name}: expected a list of tensors; got {value_of(tensors)}")
        for i, tensor in enumerate(tensors):
            check_tensors(**{f"{name}[{i}]": tensor})
        if len(tensors) != len(params):
            raise ShapeError(
                f"{name}: expected {len(params)} tensors, one a parameter; got {len(tensors)}"
            )
    for i, p in enumerate(params):
        check_dtype(f"params[{i}]", p, WEIGHTS)
        check_device(f"params[{i}]", p, params[0].device)
        blocks = scale_shape(p.shape)
        for name, tensors in lists.items():
            tensor, scales = tensors[i], name.endswith("_scale")
            shape: Sequence[int] = blocks if scales else p.shape
            if tensor.shape != shape:
                raise ShapeError(
                    f"{name}[{i}]: expected {list(shape)} for a parameter of {shape_of(p)}; "
                    f"got {shape_of(tensor)}"
                )
            code = torch.float32 if scales else torch.uint8
            check_dtype(f"{name}[{i}]", tensor, (p.dtype if name == "grads" else code,))
            check_device(f"{name}[{i}]", tensor, p.device)


def _check_step_numbers(**numbers: float) -> None:
    """At least 0, and betas below 1."""
    for name, number in numbers.items():
        check_number(name, number)
    if not all(n >= 0 and (n < 1 or "beta" not in name) for name, n in numbers.items()):
        got = ", ".join(map(str, numbers.values()))
        raise ConfigError(f"{', '.join(numbers)}: expected >= 0, and betas below 1; got {got}")


def adamw8bit_state(p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(m, m_scale, v, v_scale) of a parameter before its first step: all of it stands for zero."""
    check_tensors(p=p)
    check_dtype("p", p, WEIGHTS)
    m, v = (
        torch.full(p.shape, code_of_zero, dtype=torch.uint8, device=p.device)
        for code_of_zero in (ZERO_OF_M, ZERO_OF_V)
    )
    m_scale, v_scale = (
        torch.zeros(scale_shape(p.shape), dtype=torch.float32, device=p.device) for _ in range(2)
    )
    return m, m_scale, v, v_scale
