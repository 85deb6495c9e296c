"""The CPU kernels of 8-bit AdamW, of every instruction set, against the reference."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lowrank import ops
from lowrank.ops import adamw8bit, cpu
from tests.ops.isas import ISAS, needs_library, running_on, using_threads

SHAPES = [(5, 700), (3, 256), (40, 16), (7,), (), (3, 5, 3, 3), (1, 1000), (2, 33), (9, 48)]
OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


def lists(states):
    """[[p, m, m_scale, v, v_scale], ...] as the operator takes them."""
    return list(zip(*states, strict=True))


def take(states, grads, step):
    params, *rest = lists(states)
    ops.adamw8bit_step(params, grads, *rest, step=step, **OPTIONS)


def copied(states):
    return [[t.clone() for t in state] for state in states]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_codes_and_scales_are_the_references_to_the_bit(isa, threads, dtype):
    params = [torch.randn(shape).to(dtype) for shape in SHAPES]
    ours = [[p, *ops.adamw8bit_state(p)] for p in params]
    for step in range(1, 13):
        spread = 10 ** (1.5 * torch.randn(()).item() - 3)
        grads = [(torch.randn(p.shape) * torch.randn(p.shape) * spread).to(dtype) for p in params]
        for grad in grads:
            if step % 3 == 0 and grad.dim() > 1:
                grad[..., ::2] = 0
        theirs = copied(ours)
        with ops.use_backend("reference"):
            take(theirs, grads, step)
        with running_on(isa), using_threads(threads):
            take(ours, grads, step)
        for got, expected in zip(ours, theirs, strict=True):
            # Its square root may be one off in the last place, and so a parameter by one rounding.
            off = torch.finfo(dtype).eps
            torch.testing.assert_close(got[0], expected[0], rtol=off, atol=1e-8)
            for mine, its in zip(got[1:], expected[1:], strict=True):
                assert torch.equal(mine, its)


@pytest.mark.parametrize("isa", ISAS)
def test_gradients_need_not_be_contiguous(isa):
    p = torch.randn(30, 70)
    ours = [[p, *ops.adamw8bit_state(p)]]
    theirs = copied(ours)
    grad = torch.randn(70, 30).T
    with running_on(isa):
        take(ours, [grad], 1)
        take(theirs, [grad.contiguous()], 1)
    assert all(map(torch.equal, ours[0], theirs[0]))


@needs_library
def test_what_the_pointers_need_is_refused_with_a_reason():
    p = torch.randn(4, 300)
    m, m_scale, v, v_scale = ops.adamw8bit_state(p)
    numbers = (1e-3, 0.9, 0.999, 1e-8, 0.0, 1)

    def reason(p=p, grad=p, m=m, m_scale=m_scale, v=v, v_scale=v_scale):
        lists = [p], [grad], [m], [m_scale], [v], [v_scale]
        return cpu.refuse("adamw8bit_step", *lists, *numbers)

    assert reason() is None
    assert "float64" in reason(p=p.double(), grad=p.double())
    assert "gradient" in reason(grad=p.half())
    assert "gradient" in reason(grad=p[:2])
    assert "codes" in reason(m=m.int())
    assert "codes" in reason(v=v[:, :256])
    assert "scales" in reason(m_scale=m_scale.double())
    assert "scales" in reason(v_scale=v_scale[:, :1])
    assert "contiguous" in reason(p=p.T.contiguous().T)
    assert "contiguous" in reason(m=m.T.contiguous().T)
    assert "CPU" in reason(v=v.to("meta"))
    assert "length" in cpu.refuse("adamw8bit_step", [p], [], [m], [m_scale], [v], [v_scale])


def test_a_parameter_that_is_not_contiguous_runs_on_the_reference():
    start, grad = torch.randn(40, 30), torch.randn(30, 40)
    strided, dense = start.T, start.T.contiguous()
    for p in (strided, dense):
        take([[p, *ops.adamw8bit_state(p)]], [grad], 1)
    torch.testing.assert_close(strided, dense, rtol=1e-6, atol=1e-8)


@needs_library
def test_threads_that_are_the_first_together():
    """Whoever comes before the maps are made makes his own, and needs it until he is done."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    states = [[p, *ops.adamw8bit_state(p)] for p in torch.randn(4, 3, 300).unbind()]
    theirs, grad = copied(states), torch.randn(3, 300)
    try:
        with ThreadPoolExecutor(4) as pool:
            for step in range(1, 21):
                take(theirs, [grad] * 4, step)
                adamw8bit.dynamic_map.cache_clear()
                meeting = threading.Barrier(4)

                def one(state, step=step, meeting=meeting):
                    meeting.wait()
                    with torch.no_grad():
                        take([state], [grad], step)

                list(pool.map(one, states))
    finally:
        sys.setswitchinterval(interval)
    for got, expected in zip(states, theirs, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
