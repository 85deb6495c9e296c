"""The operators lora_linear and lora_linear_backward: their meaning and their gradients."""

from __future__ import annotations

import pytest
import torch

from lowrank import ops


@pytest.mark.parametrize("base", ["none", "dense"])
@pytest.mark.parametrize("ids", [None, [2, -1, 0, 0, 2]])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(base, ids, p, seed):
    M, K, N, R, E = 5, 7, 6, 2, 1 if ids is None else 3
    with ops.use_backend("reference"):
        x, A, B, bias = (
            torch.randn(shape, dtype=torch.float64, requires_grad=True)
            for shape in ((M, K), (E, R, K), (E, N, R), (N,))
        )
        weight = None if base == "none" else torch.randn(N, K, dtype=torch.float64)
        groups = None if ids is None else ops.group_rows(torch.tensor(ids), E)
        scalar = torch.tensor(seed) if p else None

        def run(x, A, B, bias):
            b = None if weight is None else bias
            return ops.lora_linear(x, weight, None, None, None, b, 64, A, B, 1.5, groups, p, scalar)

        assert torch.autograd.gradcheck(run, (x, A, B, bias))
