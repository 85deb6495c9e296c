"""linear_cross_entropy against torch's cross entropy of the full logits in float64."""

import pytest
import torch
import torch.nn.functional as F

from lowrank import ops
from lowrank.errors import ConfigError, DataError, DtypeError, ShapeError


@pytest.fixture(autouse=True, params=["reference", None], ids=["reference", "best"])
def backend(request):
    with ops.use_backend(request.param):
        yield


def example(T, H, V, dtype=torch.float32, weight_dtype=None, ignored=0.5):
    x = torch.randn(T, H, dtype=dtype, requires_grad=True)
    weight = (torch.randn(V, H) / H**0.5).to(weight_dtype or dtype)
    labels = torch.randint(0, V, (T,))
    labels[torch.rand(T) < ignored] = -100
    return x, weight, labels


def oracle(x, weight, labels):
    x = x.detach().double().requires_grad_()
    loss = F.cross_entropy(x @ weight.double().T, labels, ignore_index=-100, reduction="sum")
    (dx,) = torch.autograd.grad(loss, x)
    return loss.detach(), dx


def logits_gradient(x, weight, labels):
    logits = (x.detach().double() @ weight.double().T).requires_grad_()
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 2e-6),
        (torch.bfloat16, torch.bfloat16, 4e-3),
        (torch.float16, torch.float16, 6e-4),
        (torch.float32, torch.bfloat16, 2e-6),
    ],
)
@pytest.mark.parametrize(
    ("T", "H", "V"), [(1, 1, 2), (33, 17, 63), (123, 64, 1000), (700, 8, 30000)]
)
def test_loss_and_gradient(T, H, V, dtype, weight_dtype, tolerance):
    x, weight, labels = example(T, H, V, dtype, weight_dtype)
    labels[0] = V - 1
    expected_loss, expected_dx = oracle(x, weight, labels)
    loss = ops.linear_cross_entropy(x, weight, labels)
    assert loss.shape == () and loss.dtype == torch.float32
    assert abs(loss.item() - expected_loss.item()) < 3e-6 * max(1, abs(expected_loss.item()))
    (dx,) = torch.autograd.grad(loss, x)
    assert dx.dtype == dtype
    rows = weight[labels.clamp(min=0)].double()[labels >= 0]  # dx is a difference to these
    allowed = tolerance * expected_dx.norm() + 1e-6 * rows.norm()
    if dtype == torch.bfloat16:  # the logits' gradient too is rounded to it, where it is fast
        allowed += 2**-9 * logits_gradient(x, weight, labels).abs().mm(weight.double().abs()).norm()
    assert (dx.double() - expected_dx).norm() < allowed
    assert (dx[labels == -100] == 0).all()


def test_large_logits_neither_overflow_nor_lose_the_label():
    _, _, labels = example(20, 16, 50, ignored=0)
    # whole numbers: logits of tens of thousands are exact in float32, so only the softmax can err
    x = torch.randint(-4, 5, (20, 16)).float().requires_grad_()
    weight = torch.randint(-2000, 2001, (50, 16)).float()
    expected_loss, expected_dx = oracle(x, weight, labels)
    loss = ops.linear_cross_entropy(x, weight, labels)
    (dx,) = torch.autograd.grad(loss, x)
    assert abs(loss.item() - expected_loss.item()) < 1e-5 * expected_loss.item()
    torch.testing.assert_close(dx.double(), expected_dx, rtol=1e-5, atol=1e-2)


def test_leading_dimensions_and_the_incoming_gradient():
    x, weight, labels = example(24, 12, 40)
    _, expected = oracle(x, weight, labels)
    shaped = x.detach().view(2, 3, 4, 12).requires_grad_()
    loss = ops.linear_cross_entropy(shaped, weight, labels.view(2, 3, 4))
    (loss * -0.25).backward()
    torch.testing.assert_close(
        shaped.grad.view(24, 12).double(), expected * -0.25, rtol=1e-4, atol=1e-6
    )


def test_nothing_labelled_is_zero_loss_and_zero_gradient():
    x, weight, labels = example(5, 8, 30, ignored=1.1)
    loss = ops.linear_cross_entropy(x, weight, labels)
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()


def test_no_gradient_is_formed_where_none_is_wanted():
    x, weight, labels = example(50, 8, 30)
    with torch.no_grad():
        loss = ops.linear_cross_entropy(x, weight, labels)
    assert not loss.requires_grad
    assert torch.ops.lowrank.linear_cross_entropy(x.detach(), weight, labels, False)[1].numel() == 0
    assert not ops.linear_cross_entropy(x.detach(), weight, labels).requires_grad


def test_a_second_derivative_is_refused_rather_than_zero():
    x, weight, labels = example(6, 8, 30, ignored=0)
    for squared, message in ((False, "does not require grad"), (True, "differentiate twice")):
        loss = ops.linear_cross_entropy(x, weight, labels)
        loss = loss**2 if squared else loss
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            dx.sum().backward()


def test_bad_input_is_named():
    x, weight, labels = example(6, 8, 30, ignored=0)
    with pytest.raises(ShapeError, match=r"expected \[..., H\] and \[V, H\]"):
        ops.linear_cross_entropy(x, weight.T, labels)
    with pytest.raises(ShapeError, match="labels: expected"):
        ops.linear_cross_entropy(x, weight, labels[1:])
    with pytest.raises(DtypeError, match="labels: expected torch.int64"):
        ops.linear_cross_entropy(x, weight, labels.int())
    with pytest.raises(DtypeError, match="x: expected"):
        ops.linear_cross_entropy(x.detach().int(), weight, labels)
    with pytest.raises(ConfigError, match="weight: expected a frozen head"):
        ops.linear_cross_entropy(x, weight.requires_grad_(), labels)
    weight = weight.detach()
    for wrong in (30, -1, -101):
        labels[3] = wrong
        with pytest.raises(DataError, match=rf"labels: .*\[0, 30\).*got {wrong};"):
            ops.linear_cross_entropy(x, weight, labels)
