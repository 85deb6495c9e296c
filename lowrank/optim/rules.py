"""What each optimizer computes, over plain lists: a rule knows no groups, files or devices.

    states = {"m": [m of params[0], ...], ...}
    rule.step(params, grads, states, step=1, **rule.defaults)

moves params and states in place, under torch.no_grad(); 1 is the first step. A parameter may be
stepped in pieces, views of it with states of their own: to the same bits, as no block of 256
elements is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lowrank.ops.adamw8bit import BLOCK, ZERO_OF_M, ZERO_OF_V, rows_and_columns, scale_shape


class State(NamedTuple):
    """One tensor of a parameter's state before the first step: `fill` everywhere."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: int

    def make(self, device: torch.device) -> Tensor:
        return torch.full(self.shape, self.fill, dtype=self.dtype, device=device)


@dataclass(frozen=True, eq=False)
class Rule:
    """One optimizer's arithmetic."""

    defaults: Mapping[str, Any]  # the numbers that `step` takes by name, besides `step`
    states: Callable[[Tensor], dict[str, State]]  # of a parameter, or of a piece of one
    layout: Callable[[torch.Size], tuple[int, int]]  # a parameter's shape -> (rows, columns)
    step: Callable[..., None]  # (params, grads, states, *, step, ...): all on one device
    small: Rule | None = None  # with the same numbers, for tensors not worth 8 bits


class Piece(NamedTuple):
    """`rows` times `columns` consecutive elements of a parameter, from element `start` on."""

    start: int
    rows: int
    columns: int

    def of(self, tensor: Tensor) -> Tensor:
        """[rows, columns], a view of a contiguous parameter or of its gradient."""
        elements = tensor.view(-1).narrow(0, self.start, self.rows * self.columns)
        return elements.view(self.rows, self.columns)


def next_piece(rule: Rule, shape: torch.Size, start: int, most: int) -> Piece:
    """The part of a parameter of this shape from element `start` on, of at most `most` elements.

    Whole rows; or, of a row longer than `most`, which is 256 or more, whole blocks of 256. In the
    flat states of the whole parameter those of its pieces lie one after another.
    """
    rows, columns = rule.layout(shape)
    row, column = divmod(start, columns)
    if column == 0 and columns <= most:
        return Piece(start, min(most // columns, rows - row), columns)
    left = columns - column
    return Piece(start, 1, left if left <= most else most // BLOCK * BLOCK)


def _one_row(shape: torch.Size) -> tuple[int, int]:
    """Any part of it steps alike, but torch's kernel rounds the last few elements differently."""
    return 1, shape.numel()


def _wide(p: Tensor) -> State:
    """A float32 state, float64 of a parameter in float64."""
    return State(tuple(p.shape), torch.promote_types(p.dtype, torch.float32), 0)


def _adamw_states(p: Tensor) -> dict[str, State]:
    return {"m": _wide(p), "v": _wide(p)}


def _adamw8bit_states(p: Tensor) -> dict[str, State]:
    scale = State(scale_shape(p.shape), torch.float32, 0)
    m, v = (State(tuple(p.shape), torch.uint8, zero) for zero in (ZERO_OF_M, ZERO_OF_V))
    return {"m": m, "m_scale": scale, "v": v, "v_scale": scale}


def _adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Mapping[str, Sequence[Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g²;  p = (1 - lr wd) p - lr m̂ / (√v̂ + eps)

    torch's fused kernel, in the dtype of m and v.   arXiv:1711.05101
    """
    for some in _together(params, states["m"]):
        m, v = ([states[name][i] for i in some] for name in ("m", "v"))
        moved = [params[i].to(m[0].dtype).contiguous() for i in some]
        before = torch.full((len(some),), step - 1.0, dtype=torch.float32, device=m[0].device)
        adamw(
            moved,
            [grads[i].to(m[0].dtype).contiguous() for i in some],
            m,
            v,
            [],
            list(before.unbind()),
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
        for i, p in zip(some, moved, strict=True):
            if p is not params[i]:
                params[i].copy_(p)


def _together(params: Sequence[Tensor], states: Sequence[Tensor]) -> list[list[int]]:
    """Indices of what one call of torch's kernel takes; those that it needs a copy of, singly."""
    alike: dict[torch.dtype, list[int]] = {}
    copied = []
    for i, (p, state) in enumerate(zip(params, states, strict=True)):
        if p.dtype == state.dtype and p.is_contiguous():
            alike.setdefault(p.dtype, []).append(i)
        else:
            copied.append([i])
    return [*alike.values(), *copied]


def _adamw8bit_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Mapping[str, Sequence[Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """The same with codes of 8 bits for m and v.   arXiv:2110.02861"""
    lists = (list(states[name]) for name in ("m", "m_scale", "v", "v_scale"))
    # not ops.adamw8bit_step: it checks every tensor, which here fit, and takes as long as the step
    torch.ops.lowrank.adamw8bit_step(
        list(params), list(grads), *lists, lr, *betas, eps, weight_decay, step
    )


def _lion_states(p: Tensor) -> dict[str, State]:
    return {"m": _wide(p)}


def _lion8bit_states(p: Tensor) -> dict[str, State]:
    states = _adamw8bit_states(p)
    return {name: states[name] for name in ("m", "m_scale")}


def _lion_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Mapping[str, Sequence[Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    step: int,
) -> None:
    """c = b1 m + (1 - b1) g;  m = b2 m + (1 - b2) g;  p = (1 - lr wd) p - lr sign(c)

    c that is not finite makes p NaN.   arXiv:2302.06675
    """
    for p, grad, m in zip(params, grads, states["m"], strict=True):
        g = grad.to(m.dtype)
        c = m * betas[0] + g * (1 - betas[0])
        p.copy_(p.to(m.dtype) * (1 - lr * weight_decay) - (c.sign() + c * 0) * lr)
        m.mul_(betas[1]).add_(g * (1 - betas[1]))


def _lion8bit_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Mapping[str, Sequence[Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    step: int,
) -> None:
    """The same with codes of 8 bits for m."""
    lists = (list(states[name]) for name in ("m", "m_scale"))
    torch.ops.lowrank.lion8bit_step(list(params), list(grads), *lists, lr, *betas, weight_decay)


_ADAMW_DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
ADAMW = Rule(_ADAMW_DEFAULTS, _adamw_states, _one_row, _adamw_step)
ADAMW_8BIT = Rule(
    _ADAMW_DEFAULTS, _adamw8bit_states, rows_and_columns, _adamw8bit_step, small=ADAMW
)

_LION_DEFAULTS = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}
LION = Rule(_LION_DEFAULTS, _lion_states, _one_row, _lion_step)
LION_8BIT = Rule(_LION_DEFAULTS, _lion8bit_states, rows_and_columns, _lion8bit_step, small=LION)
