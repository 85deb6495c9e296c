"""The operators lora_linear and lora_linear_backward: every backend that is here, and the formula.

The oracle is torch in float64 on the reference's mask of dropout, and autograd through that.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lowrank import ops
from lowrank.ops.reference.philox import kept
from tests.ops.weights import dense, random_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Products and sums of float32, and then at most two roundings to the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

SHAPES = [  # leading dimensions of x, K, N, R
    ((1,), 63, 123, 4),
    ((17,), 64, 64, 16),
    ((2, 9), 123, 63, 5),
    ((40,), 257, 130, 1),
    ((0,), 33, 10, 3),
    ((2, 0, 3), 33, 10, 3),
    ((), 96, 31, 8),
]
# A panel of rows ends within an adapter's rows, on CPUs.
LARGE = ((300,), 4099, 35, 7)


class Case(NamedTuple):
    """The arguments of ops.lora_linear, and which adapter each row has."""

    x: Tensor
    weight: tuple[Tensor | None, ...]  # weight, absmax, absmax_scale, codebook
    bias: Tensor | None
    block_size: int
    A: Tensor
    B: Tensor
    scale: float
    ids: Tensor | None
    p: float
    seed: Tensor | None

    def run(self, x=None, bias=None, A=None, B=None) -> Tensor:
        given = (x, bias, A, B)
        own = (self.x, self.bias, self.A, self.B)
        x, bias, A, B = (o if g is None else g for g, o in zip(given, own, strict=True))
        groups = None if self.ids is None else ops.group_rows(self.ids, self.A.shape[0])
        return ops.lora_linear(
            x, *self.weight, bias, self.block_size, A, B, self.scale, groups, self.p, self.seed
        )

    def formula(self, x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        """The same in float64, row by row of the mask, with every step written out."""
        K = x.shape[-1]
        rows = x.reshape(-1, K)
        M = rows.shape[0]
        y = rows.new_zeros(M, B.shape[1])
        if self.weight[0] is not None:
            w = self.weight[0]
            if self.weight[3] is not None:
                w = dense(*self.weight, K, self.block_size)
            y = rows @ w.double().T
        if bias is not None:
            y = y + bias
        z = rows
        if self.seed is not None:
            z = rows * kept(torch.arange(M), K, self.p, self.seed) / (1 - self.p)
        ids = torch.zeros(M, dtype=torch.long) if self.ids is None else self.ids.long()
        for e in range(A.shape[0]):
            y = y + (ids == e)[:, None] * self.scale * (z @ A[e].T @ B[e].T)
        return y.view(*x.shape[:-1], B.shape[1])


def case(
    base: str, dtype: torch.dtype, shape=SHAPES[2], grouped=False, p=0.0, adapters=torch.float32
) -> Case:
    leading, K, N, R = shape
    M = torch.Size(leading).numel()
    E = 4 if grouped else 1
    x = torch.randn(*leading, K).to(dtype)
    weight: tuple[Tensor | None, ...] = (None,) * 4
    block_size = 32
    if base == "dense":
        weight = ((torch.randn(N, K) / K**0.5).to(dtype), None, None, None)
    elif base != "none":
        weight = random_weight(N, K, block_size, base == "double")
    bias = None if base == "none" else torch.randn(N).to(dtype)
    A, B = torch.randn(E, R, K) / K**0.5, torch.randn(E, N, R) / R**0.5
    ids = torch.tensor([2, -1, 0, 3])[torch.randint(4, (M,))] if grouped else None  # 1 has no row
    seed = torch.randint(-(2**62), 2**62, ()) if p else None
    return Case(x, weight, bias, block_size, A.to(adapters), B.to(adapters), 0.7, ids, p, seed)


def gradients(run, case: Case, dtype: torch.dtype | None, dy: Tensor) -> list[Tensor]:
    """y and the gradients in x, bias, A and B of `run` on the case's values, in dtype if given."""
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_()
        for t in (case.x, case.bias, case.A, case.B)
    ]
    y = run(*leaves)
    used = [leaf for leaf in leaves if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, used, dy.to(y.dtype))]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape and g.isfinite().all()
        error = (g.double() - w).norm() / w.norm().clamp(min=1e-30)
        assert error <= tolerance or not w.any(), f"result {i}: relative error {error:.2e}"
        assert w.any() or not g.any(), f"result {i}: expected zeros"


@pytest.fixture(params=["reference", "cpu", "cpu_int16"])
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("grouped", [False, True], ids=["one", "grouped"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", ["none", "dense", "plain", "double"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(backend, shape, base, dtype, grouped, p):
    made = case(base, dtype, shape, grouped, p)
    dy = torch.randn(*shape[0], shape[2]).to(dtype)
    got = gradients(made.run, made, None, dy)
    want = gradients(made.formula, made, torch.float64, dy)
    assert [g.dtype for g in got[:2]] == [dtype] * 2
    tolerance = TOLERANCE[dtype]
    if backend == "cpu_int16" and base in ("plain", "double"):
        tolerance += 2e-4
    assert_close(got, want, tolerance)
