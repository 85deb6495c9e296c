"""The rules by themselves: what they step whole and in pieces, to the bit."""

import math

import pytest
import torch

from lowrank.optim import rules

RULES = {"adamw": rules.ADAMW, "adamw8bit": rules.ADAMW_8BIT}
RULES |= {"lion": rules.LION, "lion8bit": rules.LION_8BIT}
SHAPES = [(7, 1003), (40, 16), (3, 5, 7, 7), (1000,), (), (2, 700), (0, 4), (4, 0), (5, 256)]


@pytest.fixture(params=RULES.values(), ids=RULES)
def rule(request):
    return request.param


def fresh(rule, tensors):
    """Lists of states, by name, as `step` takes them."""
    made = [rule.states(p) for p in tensors]
    names = made[0] if made else {}
    return {name: [state[name].make(torch.device("cpu")) for state in made] for name in names}


def pieces(rule, shape, most):
    """A whole parameter, piece by piece."""
    start = 0
    while start < math.prod(shape):
        piece = rules.next_piece(rule, torch.Size(shape), start, most)
        yield piece
        start += piece.rows * piece.columns


@pytest.mark.parametrize("most", [256, 1000, 5000, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_step_to_the_bits_of_the_whole(rule, dtype, most):
    params = [torch.randn(shape).to(dtype) for shape in SHAPES]
    cut = [p.clone() for p in params]
    parts = [list(pieces(rule, p.shape, most)) for p in params]
    for p, its in zip(params, parts, strict=True):
        assert sum(part.rows * part.columns for part in its) == p.numel()
        assert all(part.rows * part.columns <= most for part in its)
    views = [part.of(p) for p, its in zip(cut, parts, strict=True) for part in its]
    whole, pieced = fresh(rule, params), fresh(rule, views)
    numbers = dict(rule.defaults) | {"lr": 1e-2, "weight_decay": 0.1}
    for step in range(1, 5):
        grads = [torch.randn(shape).to(dtype) for shape in SHAPES]
        rule.step(params, grads, whole, step=step, **numbers)
        of_parts = [part.of(g) for g, its in zip(grads, parts, strict=True) for part in its]
        for i in range(len(views)):  # in calls of their own, as pages come
            one = {name: [tensors[i]] for name, tensors in pieced.items()}
            rule.step([views[i]], [of_parts[i]], one, step=step, **numbers)
    assert all(map(torch.equal, cut, params))
    for name, tensors in whole.items():
        flat = [torch.cat([t.flatten() for t in list_of]) for list_of in (tensors, pieced[name])]
        assert torch.equal(*flat), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_32_bits_are_torchs(dtype):
    """Its fused kernel, which is bit for bit what it is called with."""
    params = [torch.randn(shape).to(dtype) for shape in SHAPES]
    theirs = [p.clone().requires_grad_() for p in params]
    numbers = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(theirs, fused=True, **numbers)
    states = fresh(rules.ADAMW, params)
    for step in range(1, 8):
        grads = [torch.randn_like(p) for p in params]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        rules.ADAMW.step(params, grads, states, step=step, **numbers)
        optimizer.step()
    assert all(map(torch.equal, params, theirs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters_have_32_bit_moments(dtype):
    start = torch.randn(30, 70)
    p, exact = start.to(dtype), start.to(dtype).double().requires_grad_()
    optimizer = torch.optim.AdamW([exact], lr=1e-2)
    states = fresh(rules.ADAMW, [p])
    for step in range(1, 4):
        grad = torch.randn(30, 70).to(dtype)
        before = p.clone()
        with torch.no_grad():
            exact.copy_(before)
        exact.grad = grad.double()
        rules.ADAMW.step([p], [grad], states, step=step, **rules.ADAMW.defaults | {"lr": 1e-2})
        optimizer.step()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(p.double(), exact.detach(), rtol=eps / 2 + 1e-6, atol=1e-7)
    their = optimizer.state[exact]
    torch.testing.assert_close(states["m"][0].double(), their["exp_avg"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(states["v"][0].double(), their["exp_avg_sq"], rtol=1e-5, atol=1e-9)


def test_strides_of_parameter_and_gradient_do_not_matter(rule):
    p, grad = torch.randn(6, 5, 30), torch.randn(6, 5, 30)
    strided, its = p.permute(2, 0, 1).contiguous().permute(1, 2, 0), grad.mT.contiguous().mT
    states, others = fresh(rule, [p]), fresh(rule, [strided])
    for step in (1, 2):
        rule.step([p], [grad], states, step=step, **rule.defaults)
        rule.step([strided], [its], others, step=step, **rule.defaults)
    torch.testing.assert_close(strided, p, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(others["m"][0], states["m"][0], rtol=1e-6, atol=1e-9)


def test_a_list_of_none(rule):
    rule.step([], [], {name: [] for name in rule.states(torch.zeros(3))}, step=1, **rule.defaults)
