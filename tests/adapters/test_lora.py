"""The mathematics: initialisation, merged weights, adapters folded into one."""

from __future__ import annotations

import math

import pytest
import torch

from lowrank.adapters import lora
from lowrank.errors import WeightError


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


def test_folded_is_the_sum_of_the_branches():
    K, N = 11, 7
    branches = [
        (torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True), s)
        for R, s in ((3, 0.5), (1, -2.0), (4, 1.0))
    ]
    A, B, s = lora.folded(branches)
    assert A.shape == (1, 8, K) and B.shape == (1, N, 8)
    torch.testing.assert_close(s * B[0] @ A[0], sum(s * B @ A for A, B, s in branches))
    A, B, s = lora.folded(branches[:1])
    assert s == 0.5 and A.data_ptr() == branches[0][0].data_ptr()
