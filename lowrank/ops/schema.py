"""Every `lowrank::` operator in one table: what it takes and returns, its fake, and its gradient.

M rows of x, N out features, K in features, G block size, V words. A weight [N, K] is
    packed        uint8   [N, ceil(K / 32) * 16]: two codes a byte, the even in the high nibble
    absmax        float32 [N, ceil(K / G)], or uint8 of that shape when double-quantized
    absmax_scale  None, or float32 [N, 2] = (step, offset) of each row of uint8 absmax
    codebook      float32 [T, 16], T = 1 or N
and w[n, k] = codebook[t, code[n, k]] * absmax[n, k // G]. `reference/` says what each means.

Beside it, E adapters of rank R: A [E, R, K] and B [E, N, R]. With order int32 [M], a permutation of
the rows of x, and offsets int32 [E + 1] that end with M, rows order[offsets[e] : offsets[e + 1]]
are those of adapter e, and those before offsets[0] of none; without, all rows are of the one
adapter there is.

An optimizer's step takes lists, changes them in place and has no gradient.

Backward saves the weight's tensors and never x: a frozen weight has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import autograd, dispatch


class Operator(NamedTuple):
    schema: str
    fake: Callable  # inputs -> empty outputs, for meta tensors and tracing
    setup: Callable | None = None  # (ctx, inputs, output): what the forward keeps
    backward: Callable | None = None  # (ctx, *grads) -> one gradient for each input
    own: Callable | None = None  # inputs -> those of a rank that has a part of the weight's columns


_WEIGHT = "Tensor packed, Tensor absmax, Tensor? absmax_scale, Tensor codebook"
_NO_WEIGHT_GRADS = (None, None, None, None)

_MAYBE_WEIGHT = "Tensor? weight, Tensor? absmax, Tensor? absmax_scale, Tensor? codebook"
_ADAPTERS = "Tensor A, Tensor B, float scale, Tensor? order, Tensor? offsets, float p, Tensor? seed"
_LORA_BIAS, _LORA_A, _LORA_B = 5, 7, 8  # where among the inputs of lora_linear


# codebook_quantize and codebook_dequantize: constants in, constants out.


def _quantize_fake(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    packed = weight.new_empty(N, (K + 31) // 32 * 16, dtype=torch.uint8)
    return packed, weight.new_empty(N, (K + block_size - 1) // block_size, dtype=torch.float32)


def _dequantize_fake(packed, absmax, absmax_scale, codebook, K, block_size, dtype) -> Tensor:
    return packed.new_empty(packed.shape[0], K, dtype=dtype)


def _dequantize_own(packed, absmax, absmax_scale, codebook, K, block_size, dtype) -> tuple:
    return packed, absmax, absmax_scale, codebook, _own_columns(packed, K), block_size, dtype


def _own_columns(packed: Tensor, K: int) -> int:
    """How many of the weight's K columns are in `packed`: a part ends where its bytes do."""
    return min(K, 2 * packed.shape[1])


def _mark_constant(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


def _no_gradients(count: int) -> Callable:
    return lambda ctx, *grads: (None,) * count


# codebook_linear: y = x Wᵀ + b, so dx = dy W and db = sum of dy over the rows.


def _linear_fake(x, packed, absmax, absmax_scale, codebook, bias, block_size) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _linear_setup(ctx, inputs, output) -> None:
    x, packed, absmax, absmax_scale, codebook, _, block_size = inputs
    ctx.save_for_backward(packed, absmax, absmax_scale, codebook)
    ctx.K, ctx.block_size = x.shape[-1], block_size


def _linear_backward(ctx, dy: Tensor):
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.lowrank.codebook_linear_dx(dy, *ctx.saved_tensors, ctx.K, ctx.block_size)
    if ctx.needs_input_grad[5]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx, *_NO_WEIGHT_GRADS, dbias, None


# codebook_linear_dx: dx = dy W is linear in dy, so its gradient is the forward: d(dy) = d(dx) Wᵀ.


def _linear_dx_fake(dy, packed, absmax, absmax_scale, codebook, K, block_size) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], K)


def _linear_dx_own(dy, packed, absmax, absmax_scale, codebook, K, block_size) -> tuple:
    return dy, packed, absmax, absmax_scale, codebook, _own_columns(packed, K), block_size


def _linear_dx_setup(ctx, inputs, output) -> None:
    _, packed, absmax, absmax_scale, codebook, _, block_size = inputs
    ctx.save_for_backward(packed, absmax, absmax_scale, codebook)
    ctx.block_size = block_size


def _linear_dx_backward(ctx, ddx: Tensor):
    ddy = torch.ops.lowrank.codebook_linear(ddx, *ctx.saved_tensors, None, ctx.block_size)
    return ddy, *_NO_WEIGHT_GRADS, None, None


# linear_cross_entropy: the forward has already formed d loss / dx.


def _cross_entropy_fake(x, weight, labels, with_dx) -> tuple[Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return loss, x.new_empty(x.shape if with_dx else (0,))


def _cross_entropy_setup(ctx, inputs, output) -> None:
    dx = output[1]
    ctx.mark_non_differentiable(dx)
    ctx.save_for_backward(dx)


@once_differentiable
def _cross_entropy_backward(ctx, dloss: Tensor, _):
    (dx,) = ctx.saved_tensors
    return dx * dloss.to(dx.dtype), None, None, None


# lora_linear: x is kept for dA alone, h for dB alone; dropout's mask is formed anew from its seed.


def _lora_fake(x, weight, absmax, absmax_scale, codebook, bias, block_size, A, B, *rest):
    h_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    M = math.prod(x.shape[:-1])
    return x.new_empty(*x.shape[:-1], B.shape[1]), x.new_empty(M, A.shape[1], dtype=h_dtype)


def _lora_setup(ctx, inputs, output) -> None:
    x, *weight, _, block_size, A, B, scale, order, offsets, p, seed = inputs
    h = output[1]
    ctx.mark_non_differentiable(h)
    needs = ctx.needs_input_grad
    ctx.needs = [needs[0], needs[_LORA_A], needs[_LORA_B]]
    kept = (x if needs[_LORA_A] else None, h if needs[_LORA_B] else None)
    kept += tuple(weight) if needs[0] else _NO_WEIGHT_GRADS
    ctx.save_for_backward(*kept, A, B, order, offsets, seed)
    ctx.block_size, ctx.scale, ctx.p = block_size, scale, p


@once_differentiable
def _lora_backward(ctx, dy: Tensor, _):
    x, h, *weight, A, B, order, offsets, seed = ctx.saved_tensors
    dx = dA = dB = dbias = None
    if any(ctx.needs):
        x, h = (dy.new_empty(0) if t is None else t for t in (x, h))
        gradients = dispatch.call(
            "lora_linear_backward", dy, x, h, *weight, ctx.block_size, A, B, ctx.scale, order,
            offsets, ctx.p, seed, ctx.needs,
        )  # fmt: skip
        dx, dA, dB = (g if n else None for g, n in zip(gradients, ctx.needs, strict=True))
    if ctx.needs_input_grad[_LORA_BIAS]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dx, *_NO_WEIGHT_GRADS, dbias, None, dA, dB, *(None,) * 5


def _lora_backward_fake(
    dy, x, h, weight, absmax, absmax_scale, codebook, block_size, A, B, scale, order, offsets, p,
    seed, needs,
):  # fmt: skip
    dx = dy.new_empty((*dy.shape[:-1], A.shape[2]) if needs[0] else (0,))
    dA, dB = (t.new_empty(t.shape if n else (0,)) for t, n in zip((A, B), needs[1:], strict=True))
    return dx, dA, dB


# rms_norm, of x [..., H], keeps x and a number a row; gated its arguments; rotate the angles alone.


def _norm_fake(x, weight, eps, plus_one) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide)


def _norm_setup(ctx, inputs, output) -> None:
    x, weight, _, ctx.plus_one = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


@once_differentiable
def _norm_backward(ctx, dy: Tensor, _):
    needs = list(ctx.needs_input_grad[:2])
    gradients = dispatch.call("rms_norm_backward", dy, *ctx.saved_tensors, ctx.plus_one, needs)
    dx, dweight = (g if n else None for g, n in zip(gradients, needs, strict=True))
    return dx, dweight, None, None


def _norm_backward_fake(dy, x, weight, rstd, plus_one, needs) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if needs[0] else (0,))
    return dx, weight.new_empty(weight.shape if needs[1] else (0,))


def _rotate_fake(q, k, cos, sin, back) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _rotate_setup(ctx, inputs, output) -> None:
    _, _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_backward(ctx, dq: Tensor, dk: Tensor):
    return *dispatch.call("rotate", dq, dk, *ctx.saved_tensors, not ctx.back), None, None, None


def _gated_fake(gate, up, activation) -> Tensor:
    return gate.new_empty(gate.shape)


def _gated_setup(ctx, inputs, output) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


@once_differentiable
def _gated_backward(ctx, dy: Tensor):
    return *dispatch.call("gated_backward", dy, *ctx.saved_tensors, ctx.activation), None


def _gated_backward_fake(dy, gate, up, activation) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


# adamw8bit_step and lion8bit_step: everything they compute, they write into their inputs.


def _in_place_fake(*lists_and_numbers) -> None:
    return None


OPERATORS = {
    "codebook_quantize": Operator(
        "(Tensor weight, Tensor codebook, int block_size) -> (Tensor packed, Tensor absmax)",
        _quantize_fake,
        _mark_constant,
        _no_gradients(3),
    ),
    "codebook_dequantize": Operator(
        f"({_WEIGHT}, SymInt K, int block_size, ScalarType dtype) -> Tensor",
        _dequantize_fake,
        _mark_constant,
        _no_gradients(7),
        _dequantize_own,
    ),
    "codebook_linear": Operator(
        f"(Tensor x, {_WEIGHT}, Tensor? bias, int block_size) -> Tensor",
        _linear_fake,
        _linear_setup,
        _linear_backward,
    ),
    "codebook_linear_dx": Operator(
        f"(Tensor dy, {_WEIGHT}, SymInt K, int block_size) -> Tensor",
        _linear_dx_fake,
        _linear_dx_setup,
        _linear_dx_backward,
        _linear_dx_own,
    ),
    "linear_cross_entropy": Operator(
        "(Tensor x, Tensor weight, Tensor labels, bool with_dx) -> (Tensor loss_sum, Tensor dx)",
        _cross_entropy_fake,
        _cross_entropy_setup,
        _cross_entropy_backward,
    ),
    "lora_linear": Operator(
        f"(Tensor x, {_MAYBE_WEIGHT}, Tensor? bias, int block_size, {_ADAPTERS}) "
        "-> (Tensor y, Tensor h)",
        _lora_fake,
        _lora_setup,
        _lora_backward,
    ),
    "lora_linear_backward": Operator(
        f"(Tensor dy, Tensor x, Tensor h, {_MAYBE_WEIGHT}, int block_size, {_ADAPTERS}, "
        "bool[] needs) -> (Tensor dx, Tensor dA, Tensor dB)",
        _lora_backward_fake,
        _mark_constant,
        _no_gradients(16),
    ),
    "rms_norm": Operator(
        "(Tensor x, Tensor weight, float eps, bool plus_one) -> (Tensor y, Tensor rstd)",
        _norm_fake,
        _norm_setup,
        _norm_backward,
    ),
    "rms_norm_backward": Operator(
        "(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool plus_one, bool[] needs) "
        "-> (Tensor dx, Tensor dweight)",
        _norm_backward_fake,
        _mark_constant,
        _no_gradients(6),
    ),
    "rotate": Operator(
        "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back) "
        "-> (Tensor turned_q, Tensor turned_k)",
        _rotate_fake,
        _rotate_setup,
        _rotate_backward,
    ),
    "gated": Operator(
        "(Tensor gate, Tensor up, str activation) -> Tensor",
        _gated_fake,
        _gated_setup,
        _gated_backward,
    ),
    "gated_backward": Operator(
        "(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)",
        _gated_backward_fake,
        _mark_constant,
        _no_gradients(4),
    ),
    "adamw8bit_step": Operator(
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] m, Tensor(c!)[] m_scale, "
        "Tensor(d!)[] v, Tensor(e!)[] v_scale, float lr, float beta1, float beta2, float eps, "
        "float weight_decay, SymInt step) -> ()",
        _in_place_fake,
    ),
    "lion8bit_step": Operator(
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] m, Tensor(c!)[] m_scale, "
        "float lr, float beta1, float beta2, float weight_decay) -> ()",
        _in_place_fake,
    ),
}

_library = torch.library.Library("lowrank", "DEF")

for _name, _op in OPERATORS.items():
    _library.define(_name + _op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, dispatch.runner(_name, _op.own), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowrank::{_name}", _op.fake, lib=_library)
    if _op.backward is not None:
        autograd.register(_library, _name, _op.setup, _op.backward)
