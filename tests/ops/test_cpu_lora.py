"""Dropout and the rows of adapters in the CPU kernels: every instruction set has the same bits."""

from __future__ import annotations

import ctypes

import pytest
import torch

from lowrank import ops
from lowrank.errors import DataError
from lowrank.ops import native
from lowrank.ops.reference.philox import kept, threshold
from tests.ops.isas import ISAS, running_on
from tests.ops.weights import dense, random_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 3, 63, 64, 65, 130, 1031]
NO_WEIGHT = (None, None, None, None)
IDS = torch.tensor([1, -1, 0, 1, 1, 0, -1, 0, 1, 1, 0])  # rows of either adapter lie apart


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    with running_on(request.param):
        yield


@pytest.mark.parametrize("grouped", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", WIDTHS)
def test_the_mask_is_the_references_both_ways(K, dtype, grouped, seed):
    p, M, scalar = 0.3, len(IDS), torch.tensor(seed)
    E = 2 if grouped else 1
    groups = ops.group_rows(IDS, E) if grouped else None
    has_adapter = (IDS >= 0)[:, None] if grouped else torch.ones(M, 1, dtype=torch.bool)
    mask = kept(torch.arange(M), K, p, scalar) & has_adapter
    inverse = torch.tensor(1 / (1 - p))
    x = torch.randn(M, K).to(dtype)
    # A is the identity, so that h is x after dropout
    A, B = torch.eye(K).expand(E, K, K), torch.zeros(E, 1, K)
    order, offsets = groups or (None, None)
    branch = (A, B, 1.0, order, offsets, p, scalar)
    _, h = torch.ops.lowrank.lora_linear(x, *NO_WEIGHT, None, 64, *branch)
    assert torch.equal(h, torch.where(mask, x.float() * inverse, 0))
    # of ones, so that dx is the mask
    ones = torch.ones(M, 1, dtype=dtype)
    dx, _, _ = ops.lora_linear_backward(
        ones, x, h[:, :1], *NO_WEIGHT, 64, torch.ones(E, 1, K), torch.ones(E, 1, 1), 1.0, groups,
        p, scalar, (True, False, False),
    )  # fmt: skip
    assert torch.equal(dx, (mask * inverse).to(dtype))


def test_what_is_dropped_is_zero_even_if_it_is_not_finite(seed):
    K, p, scalar = 200, 0.5, torch.tensor(seed)
    x = torch.full((4, K), torch.inf)
    mask = kept(torch.arange(4), K, p, scalar)
    A, B = torch.eye(K)[None], torch.zeros(1, 1, K)
    x[mask] = 1.0
    _, h = torch.ops.lowrank.lora_linear(
        x, *NO_WEIGHT, None, 64, A, B, 1.0, None, None, p, scalar
    )  # fmt: skip
    assert torch.equal(h, mask * 2.0)


def test_rows_beyond_32_bits(seed):
    """One row stands for 2^40 of them: the counter of the last is far beyond 32 bits."""
    K, p, first = 130, 0.5, 2**40 - 3
    x, out = torch.ones(K), torch.empty(3, K)
    rows = native.Rows(None, first, 3, 2**40)
    dropout = native.Dropout(seed, threshold(p), 2.0)
    status = native.load_cpu().lowrank_gather_rows(
        x.data_ptr(), 0, K, 0, ctypes.byref(rows), ctypes.byref(dropout), out.data_ptr(), 1
    )
    assert status == 0
    mask = kept(torch.arange(first, first + 3), K, p, torch.tensor(seed))
    assert torch.equal(out, mask * 2.0)


@pytest.mark.parametrize("wrong", [-1, 0, 5, 2**31 - 1])  # 0: a row that comes twice
def test_an_order_of_other_rows_is_refused(wrong):
    x, A, B = torch.randn(5, 40), torch.randn(1, 2, 40), torch.randn(1, 3, 2)
    order = torch.tensor([2, 0, wrong, 1, 4], dtype=torch.int32)
    groups = (order, torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(DataError, match="order: expected each of the M=5 rows of x once"):
        ops.lora_linear(x, *NO_WEIGHT, None, 64, A, B, 1.0, groups)


@pytest.mark.parametrize("offsets", [[0, 6], [-1, 5], [4, 3], [0, 4]])
def test_offsets_of_other_rows_are_refused(offsets):
    x, A, B = torch.randn(5, 40), torch.randn(1, 2, 40), torch.randn(1, 3, 2)
    groups = (torch.arange(5, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32))
    with pytest.raises(DataError, match="offsets: expected ascending"):
        ops.lora_linear(x, *NO_WEIGHT, None, 64, A, B, 1.0, groups)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "K", "R"),
    [
        (17, 13, 63, 1),
        (33, 345, 300, 8),
        (400, 65, 130, 13),
        (530, 29, 1056, 16),
        (40, 9, 40, 300),
        (49, 20, 256, 64),
        (65, 12, 576, 65),
        (97, 9, 560, 330),
    ],
)
def test_every_gradient_of_many_rows(M, N, K, R, dtype, p, seed):
    """y, h, dx, dA and dB against float64: ends of stripes, of passes, of blocks, of the rank."""
    weight, scalar = random_weight(N, K, 64, double_quant=True), torch.tensor(seed)
    x, dy, bias = (torch.randn(shape).to(dtype) for shape in ((M, K), (M, N), (N,)))
    A, B = torch.randn(1, R, K) / K**0.5, torch.randn(1, N, R) / R**0.5
    branch = (A, B, 0.5, None, None, p, scalar if p else None)
    y, h = torch.ops.lowrank.lora_linear(x, *weight, bias, 64, *branch)
    got = torch.ops.lowrank.lora_linear_backward(dy, x, h, *weight, 64, *branch, [True] * 3)
    again = torch.ops.lowrank.lora_linear(x, *weight, bias, 64, *branch)
    assert torch.equal(y, again[0]) and torch.equal(h, again[1])
    mask = kept(torch.arange(M), K, p, scalar) / (1 - p) if p else torch.ones(M, K)
    w, z = dense(*weight, K, 64).double(), x.double() * mask
    x, dy, bias, A, B = (t.double() for t in (x, dy, bias, A[0], B[0]))
    g = 0.5 * dy @ B
    exact = (
        x @ w.T + bias + 0.5 * z @ A.T @ B.T, z @ A.T, dy @ w + g @ A * mask, g.T @ z,
        0.5 * dy.T @ z @ A.T,
    )  # fmt: skip
    for tensor, right in zip((y, h, *got), exact, strict=True):
        eps = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[tensor.dtype]
        assert (tensor.double() - right).norm() <= eps * right.norm()
