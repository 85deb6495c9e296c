"""Run by test_triton.py in its own process: Triton's decorators bind the interpreter at import."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Rows of up to 16, 64 and more elements, of whole vectors and not, several blocks, one row, none.
SHAPES = [(5, 700), (3, 256), (70, 16), (130, 3), (7,), (), (2, 5, 3, 3), (1, 1000), (2, 33)]
SHAPES += [(20, 48), (30, 8), (4, 264), (0, 5), (5, 0), (0,), (1, 4104)]
NUMBERS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}

State = list[Tensor]  # p, m, m_scale, v, v_scale


def fresh(p: Tensor) -> State:
    from lowrank import ops

    return [p, *ops.adamw8bit_state(p)]


def step(backend: ModuleType, states: list[State], grads: list[Tensor], t: int, **numbers) -> None:
    """Step `t` of all states on a backend, as the operator is called."""
    p, m, m_scale, v, v_scale = map(list, zip(*states, strict=True)) if states else [[]] * 5
    backend.adamw8bit_step(p, grads, m, m_scale, v, v_scale, *(NUMBERS | numbers).values(), t)


def exact_p(state: State, grad: Tensor, t: int, **numbers) -> Tensor:
    """Where p moves, operation by operation in float32: torch's sqrt of it is not always exact."""
    from lowrank.ops import adamw8bit

    by = adamw8bit.coefficients(*(NUMBERS | numbers).values(), t)
    p, *moments = state
    N, C = adamw8bit.rows_and_columns(p.shape)
    g = grad.reshape(N, C).float()
    old = []
    for codes, scale, signed in ((*moments[:2], True), (*moments[2:], False)):
        values = adamw8bit.dynamic_map(signed)[codes.reshape(N, C).long()]
        old.append(values * scale.repeat_interleave(256, 1)[:, :C])
    m, v = old[0] * by.beta1 + g * by.rest1, old[1] * by.beta2 + g * g * by.rest2
    ratio = m / (v.double().sqrt().float() * by.root2 + by.eps)
    moved = p.reshape(N, C).float() * by.decay - ratio * by.rate
    return moved.to(p.dtype).reshape(p.shape)


def random_grad(p: Tensor, g: torch.Generator, t: int) -> Tensor:
    """Over many magnitudes, and zeros at every third step."""
    spread = 10 ** (1.5 * torch.randn((), generator=g).item() - 3)
    grad = torch.randn(p.shape, generator=g) * torch.randn(p.shape, generator=g) * spread
    if t % 3 == 0 and grad.dim() > 1:
        grad[..., ::2] = 0
    return grad.to(p.dtype)


def near_midpoints() -> tuple[Tensor, Tensor]:
    """Gradients of one block a row whose m, and whose v, lies at a midpoint or one float beside.

    Each row ends with a 1, so that with betas of 0 its scales are 1. Without the last midpoint of
    m: a negative value there would have a scale above 1.
    """
    from lowrank.ops import adamw8bit

    made = []
    for entries, root in (
        (adamw8bit.dynamic_map(True)[adamw8bit.ZERO_OF_M : -1], False),
        (adamw8bit.dynamic_map(False)[1:], True),
    ):
        middles = (entries[1:].double() + entries[:-1].double()) / 2
        middles = (middles.sqrt() if root else middles).float()
        rows = []
        for towards in (0.0, 2.0):
            values = middles
            for _ in range(3):
                for sign in (1, -1):
                    rows.append(torch.cat([values * sign, values.new_ones(256 - len(values))]))
                values = torch.nextafter(values, torch.full_like(values, towards))
        made.append(torch.stack(rows))
    return made[0], made[1]


def check(got: list[State], want: list[State], moved: list[Tensor], context: str) -> None:
    """Codes and scales to the bit; p too, but for bfloat16, which the interpreter truncates."""
    for ours, theirs, p in zip(got, want, moved, strict=True):
        where = f"{context} {list(p.shape)} {p.dtype}"
        for mine, its in zip(ours[1:], theirs[1:], strict=True):
            assert torch.equal(mine, its), where
        if p.dtype != torch.bfloat16:
            assert torch.equal(ours[0], p), where
        elif p.numel():
            towards_zero = p.view(torch.int16) - ours[0].view(torch.int16)
            assert ((towards_zero == 0) | (towards_zero == 1)).all(), where


def main(seed: int) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from lowrank.ops import reference
    from lowrank.ops import triton as interpreted

    torch.use_deterministic_algorithms(True)  # torch.empty comes full of NaN
    g = torch.Generator().manual_seed(seed)
    step(interpreted, [], [], 1)

    params = [
        torch.randn(shape, generator=g).to(DTYPES[(i + j) % 3])
        for i, shape in enumerate(SHAPES)
        for j in range(2)
    ]
    ours = [fresh(p) for p in params]
    for t in range(1, 4):
        grads = [random_grad(p, g, t) for p in params]
        theirs = [[tensor.clone() for tensor in state] for state in ours]
        moved = [exact_p(state, grad, t) for state, grad in zip(ours, grads, strict=True)]
        lists = [list(tensors) for tensors in zip(*ours, strict=True)]
        numbers = (*NUMBERS.values(), t)
        assert interpreted.refuse("adamw8bit_step", lists[0], grads, *lists[1:], *numbers) is None
        strided = [grad.mT.contiguous().mT if grad.dim() > 1 else grad for grad in grads]
        step(reference, theirs, grads, t)
        step(interpreted, ours, strided if t % 2 else grads, t)
        check(ours, theirs, moved, f"{t=} {seed=}")

    for grad, scale in zip(near_midpoints(), (2, 4), strict=True):
        ours, theirs = ([fresh(torch.zeros_like(grad))] for _ in range(2))
        step(interpreted, ours, [grad], 1, beta1=0.0, beta2=0.0)
        step(reference, theirs, [grad], 1, beta1=0.0, beta2=0.0)
        assert all(map(torch.equal, ours[0][1:], theirs[0][1:])), f"midpoints {seed=}"
        assert (ours[0][scale] == 1).all()

    for bad in (torch.nan, torch.inf, -torch.inf):
        p = torch.randn(3, 300, generator=g)
        grad = torch.randn(3, 300, generator=g)
        sound, spoilt = [fresh(p.clone())], [fresh(p.clone())]
        for t in (1, 2):
            step(interpreted, sound, [grad], t)
            wrong = grad.clone()
            if t == 1:
                wrong[1, 280] = bad
            step(interpreted, spoilt, [wrong], t)
        touched = torch.zeros(3, 300, dtype=torch.bool)
        touched[1, 256:] = True
        assert spoilt[0][0][touched].isnan().all(), bad
        assert torch.equal(spoilt[0][0][~touched], sound[0][0][~touched]), bad

    for count in (1, 520):  # one, and more than are looked at together
        params = [torch.randn(1 + i % 2, generator=g) for i in range(count)]
        ours, theirs = [fresh(p.clone()) for p in params], [fresh(p.clone()) for p in params]
        grads = [random_grad(p, g, 1) for p in params]
        moved = [exact_p(state, grad, 1) for state, grad in zip(ours, grads, strict=True)]
        step(interpreted, ours, grads, 1)
        step(reference, theirs, grads, 1)
        check(ours, theirs, moved, f"{count=} {seed=}")
    print("all steps equal")


if __name__ == "__main__":
    main(int(sys.argv[1]))
