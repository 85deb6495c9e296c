"""The mathematics: initialisation, merged weights, the branch's two halves and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from lowrank.adapters import lora
from lowrank.errors import WeightError

SHAPES = [(1, 5, 3, 2), (7, 63, 123, 4), (33, 64, 48, 16)]  # M, K, N, R


def test_scaling():
    assert lora.scaling(8, 16) == 2
    assert lora.scaling(16, 16, rslora=True) == 4


def test_init():
    A, B = torch.empty(64, 900), torch.empty(800, 64)
    lora.init_(A, B, True)
    assert A.abs().max() <= 1 / 30 and A.std().item() == pytest.approx(1 / 30 / 3**0.5, rel=0.05)
    assert not B.any()
    lora.init_(A, B, "gaussian")
    assert A.std().item() == pytest.approx(1 / 64, rel=0.05) and not B.any()
    lora.init_(A, B, False)
    assert B.abs().max() <= 1 / 8 and B.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merged_weight_is_rounded_once(dtype):
    W = torch.randn(37, 21).to(dtype)
    before = W.clone()
    branches = [
        (torch.randn(4, 21), torch.randn(37, 4), 0.7),
        (torch.randn(9, 21), torch.randn(37, 9), -2.0),
    ]
    merged = lora.merged_weight(W, branches, dtype)
    exact = W.double() + sum(s * B.double() @ A.double() for A, B, s in branches)
    assert merged.dtype == dtype and torch.equal(W, before)
    half_ulp = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
    assert ((merged.double() - exact).abs() <= half_ulp * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_merged_weight_refuses_what_is_not_finite(bad):
    A = torch.randn(2, 8)
    A[1, 3] = bad
    with pytest.raises(WeightError, match="NaN or inf"):
        lora.merged_weight(torch.randn(4, 8), [(A, torch.ones(4, 2), 1.0)], torch.float32)


def test_merged_weight_refuses_overflow_of_its_dtype():
    with pytest.raises(WeightError, match="float16"):
        lora.merged_weight(torch.full((2, 2), 7e4), [], torch.float16)


def branch(x, W, A, B, s):
    x, h = lora.down(x, A)
    return lora.up(x @ W.t(), h, B, s)


@pytest.mark.parametrize(("M", "K", "N", "R"), SHAPES)
def test_gradients_of_both_orders(M, K, N, R):
    M, K, N = min(M, 4), min(K, 7), min(N, 6)
    x, W, A, B = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in [(M, K), (N, K), (R, K), (N, R)]
    )
    W.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda x, A, B: branch(x, W, A, B, 1.5), (x, A, B))
    assert torch.autograd.gradgradcheck(lambda x, A, B: branch(x, W, A, B, 1.5), (x, A, B))


@pytest.mark.parametrize(("M", "K", "N", "R"), SHAPES)
@pytest.mark.parametrize(
    "needs", [(1, 1, 1), (0, 1, 1), (1, 0, 0), (1, 1, 0), (1, 0, 1), (0, 0, 1)]
)
def test_equals_the_formula(M, K, N, R, needs):
    def leaves():
        return [t.clone().requires_grad_(bool(n)) for t, n in zip(values, needs, strict=True)]

    values = [torch.randn(2, M, K), torch.randn(R, K), torch.randn(N, R)]
    W, weight = torch.randn(N, K), torch.randn(2, M, N)
    x, A, B = leaves()
    y = branch(x, W, A, B, 0.5)
    (y * weight).sum().backward()
    x2, A2, B2 = leaves()
    y2 = x2 @ W.t() + 0.5 * (x2 @ A2.t() @ B2.t())
    (y2 * weight).sum().backward()
    torch.testing.assert_close(y, y2, rtol=1e-5, atol=1e-4)
    for ours, theirs, need in zip((x, A, B), (x2, A2, B2), needs, strict=True):
        assert (ours.grad is not None) == bool(need)
        if need:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)


def test_non_contiguous_input_and_gradient():
    x = torch.randn(11, 6).t().requires_grad_()  # [6, 11]
    W, A, B = (
        torch.randn(5, 11),
        torch.randn(3, 11, requires_grad=True),
        torch.randn(5, 3, requires_grad=True),
    )
    weight = torch.randn(5, 6).t()
    grads = torch.autograd.grad(branch(x, W, A, B, 2.0), (x, A, B), weight)
    wanted = torch.autograd.grad(x @ W.t() + 2 * x @ A.t() @ B.t(), (x, A, B), weight)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_a_base_that_saved_its_output_is_caught():
    x = torch.randn(4, 6, requires_grad=True)
    A, B = torch.randn(2, 6, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    x_base, h = lora.down(x, A)
    y = lora.up(torch.tanh(x_base), h, B, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
