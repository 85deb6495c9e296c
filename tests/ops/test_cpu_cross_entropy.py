"""The fused softmax pass of every instruction set, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F

from lowrank import ops
from tests.ops.isas import ISAS, running_on, using_threads

pytestmark = pytest.mark.parametrize("isa", ISAS)


@pytest.fixture(autouse=True)
def kernels(isa):
    with using_threads(1), running_on(isa):
        yield


def logits_as_product(z):
    """x, W with x Wᵀ = z exactly: W is the identity, so nothing but the softmax pass is tested."""
    return z.clone().requires_grad_(), torch.eye(z.shape[1])


def oracle(z, labels):
    z = z.double().requires_grad_()
    loss = F.cross_entropy(z, labels, ignore_index=-100, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize(("T", "V"), [(1, 1), (5, 2), (9, 15), (33, 63), (2, 1031), (123, 64)])
def test_gradient_of_each_logit_to_float32(T, V, spread):
    z, labels = torch.randn(T, V) * spread, torch.randint(0, V, (T,))
    labels[torch.rand(T) < 0.3] = -100
    x, weight = logits_as_product(z)
    loss = ops.linear_cross_entropy(x, weight, labels)
    expected_loss, expected = oracle(z, labels)
    assert abs(loss.item() - expected_loss.item()) <= 1e-6 * max(1, expected_loss.item())
    (got,) = torch.autograd.grad(loss, x)
    # Rounding of z - max z alone moves a probability by 6e-8 * |z|.
    tolerance = 5e-7 + 6e-8 * z.abs().max().item()
    off_label = torch.ones_like(z, dtype=torch.bool)
    off_label[labels >= 0, labels[labels >= 0]] = False
    normal = expected.abs() > 1.2e-38
    relative = (got - expected).abs() / expected.abs().clamp(min=1e-300)
    assert (relative[off_label & normal] < 2 * tolerance).all()
    assert (got - expected).abs().max() < tolerance


def test_chunks_of_rows_and_a_wide_vocabulary():
    T, H, V = 400, 24, 50_021  # several chunks of logits, and V is no multiple of a vector
    x, weight = torch.randn(T, H, requires_grad=True), torch.randn(V, H) / H**0.5
    labels = torch.randint(0, V, (T,))
    loss = ops.linear_cross_entropy(x, weight, labels)
    (dx,) = torch.autograd.grad(loss, x)
    x64 = x.detach().double().requires_grad_()
    expected = F.cross_entropy(x64 @ weight.double().T, labels, reduction="sum")
    (expected_dx,) = torch.autograd.grad(expected, x64)
    assert abs(loss.item() / expected.item() - 1) < 1e-6
    assert (dx - expected_dx).norm() < 2e-6 * expected_dx.norm()
    with torch.no_grad():
        assert ops.linear_cross_entropy(x, weight, labels).item() == loss.item()


def test_nan_and_infinity_show_in_the_loss():
    labels = torch.tensor([0, 1])
    for bad in (torch.nan, torch.inf):
        z = torch.randn(2, 37)
        z[1, 20] = bad
        x, weight = z, torch.eye(37)
        weight[20, 0] = bad
        assert not ops.linear_cross_entropy(x, weight, labels).isfinite()


def test_bfloat16_is_as_near_as_torch_with_all_logits():
    T, H, V = 64, 96, 3001
    x, weight = torch.randn(T, H).bfloat16(), (torch.randn(V, H) / H**0.5).bfloat16()
    labels = torch.randint(0, V, (T,))
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_(), x.double().requires_grad_()]
    losses = [
        ops.linear_cross_entropy(leaves[0], weight, labels),
        F.cross_entropy((leaves[1] @ weight.T).float(), labels, reduction="sum"),
        F.cross_entropy(leaves[2] @ weight.double().T, labels, reduction="sum"),
    ]
    dx, plain, exact = (
        torch.autograd.grad(loss, leaf)[0].double()
        for loss, leaf in zip(losses, leaves, strict=True)
    )
    assert abs(losses[0].item() / losses[2].item() - 1) < 1e-6
    assert (dx - exact).norm() <= 1.05 * (plain - exact).norm()
