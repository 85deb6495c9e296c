"""Run by test_triton.py in its own process: Triton's decorators bind the interpreter at import."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import torch
from torch import Tensor

from tests.ops.interpreted_adamw8bit import DTYPES, SHAPES, check, near_midpoints, random_grad

NUMBERS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}

State = list[Tensor]  # p, m, m_scale


def fresh(p: Tensor) -> State:
    from lowrank import ops

    return [p, *ops.adamw8bit_state(p)[:2]]


def copied(states: list[State]) -> list[State]:
    return [[tensor.clone() for tensor in state] for state in states]


def step(backend: ModuleType, states: list[State], grads: list[Tensor], **numbers) -> None:
    """A step of all states on a backend, as the operator is called."""
    p, m, m_scale = map(list, zip(*states, strict=True)) if states else [[]] * 3
    backend.lion8bit_step(p, grads, m, m_scale, *(NUMBERS | numbers).values())


def main(seed: int) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from lowrank.ops import reference
    from lowrank.ops import triton as interpreted

    torch.use_deterministic_algorithms(True)  # torch.empty comes full of NaN
    g = torch.Generator().manual_seed(seed)
    step(interpreted, [], [])

    params = [torch.randn(s, generator=g).to(DTYPES[i % 3]) for i, s in enumerate(SHAPES)]
    ours = [fresh(p) for p in params]
    for t in range(1, 4):
        grads = [random_grad(p, g, t) for p in params]
        theirs = copied(ours)
        lists = [list(tensors) for tensors in zip(*ours, strict=True)]
        args = (lists[0], grads, *lists[1:], *NUMBERS.values())
        assert interpreted.refuse("lion8bit_step", *args) is None
        strided = [grad.mT.contiguous().mT if grad.dim() > 1 else grad for grad in grads]
        step(reference, theirs, grads)
        step(interpreted, ours, strided if t % 2 else grads)
        check(ours, theirs, [state[0] for state in theirs], f"{t=} {seed=}")

    grad = near_midpoints()[0]
    ours, theirs = ([fresh(torch.zeros_like(grad))] for _ in range(2))
    step(interpreted, ours, [grad], beta1=0.0, beta2=0.0)
    step(reference, theirs, [grad], beta1=0.0, beta2=0.0)
    assert all(map(torch.equal, ours[0], theirs[0])), f"midpoints {seed=}"
    assert (ours[0][2] == 1).all()

    for bad in (torch.nan, torch.inf, -torch.inf):
        grad = torch.randn(3, 300, generator=g)
        sound = [fresh(torch.randn(3, 300, generator=g))]
        spoilt = copied(sound)
        wrong = grad.clone()
        wrong[1, 280] = bad
        step(interpreted, sound, [grad])
        step(interpreted, spoilt, [wrong])
        touched = torch.zeros(3, 300, dtype=torch.bool)
        touched[1, 280] = True
        assert spoilt[0][0][touched].isnan().all(), bad
        assert torch.equal(spoilt[0][0][~touched], sound[0][0][~touched]), bad
    print("all steps equal")


if __name__ == "__main__":
    main(int(sys.argv[1]))
