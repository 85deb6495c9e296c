"""grouped_mm: one product for each group of rows, in any size and dtype."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lowrank.nn.grouped import grouped_mm

OFFS = [[0, 3, 3, 7], [0, 0, 0, 0], [9, 9, 9, 9], [2, 4, 6, 9]]


@pytest.mark.parametrize("offs", OFFS, ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_values_and_gradients_in_float64(offs, trained):
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=trained)
    ends = torch.tensor(offs)
    y = grouped_mm(x, weights.mT, offs=ends)
    *parts, rest = x.split([b - a for a, b in pairwise([0, *offs, 9])])
    products = [F.linear(part, w) for part, w in zip(parts, weights, strict=True)]
    expected = torch.cat([*products, rest.new_zeros(len(rest), 7)])
    assert_close(y, expected)
    torch.autograd.gradcheck(lambda *args: grouped_mm(*args, offs=ends), (x, weights.mT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchs_own_where_that_takes_the_sizes(dtype):
    x, weights = torch.randn(40, 32, dtype=dtype), torch.randn(4, 48, 32, dtype=dtype)
    offs = torch.tensor([11, 11, 30, 40], dtype=torch.int32)
    expected = F.grouped_mm(x, weights.mT, offs=offs)
    assert_close(grouped_mm(x, weights.mT, offs=offs), expected)


def test_frozen_weights_keep_no_input_and_autocast_casts_both():
    x, weights = torch.randn(6, 10, requires_grad=True), torch.randn(2, 10, 3)
    offs, kept = torch.tensor([2, 6]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped_mm(x, weights, offs=offs)
    assert [t.data_ptr() for t in kept] == [weights.data_ptr()]
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_mm(x, weights, offs=offs)
    assert y.dtype == torch.bfloat16
    assert_close(y, grouped_mm(x.bfloat16(), weights.bfloat16(), offs=offs))
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert dx.dtype == torch.float32
