"""8-bit AdamW on a CUDA device by Triton: codes and scales of the reference, p too, to the bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lowrank import ops  # noqa: E402
from lowrank.errors import BackendError  # noqa: E402
from lowrank.ops import reference  # noqa: E402
from tests.ops.interpreted_adamw8bit import (  # noqa: E402
    DTYPES,
    NUMBERS,
    SHAPES,
    exact_p,
    fresh,
    near_midpoints,
    random_grad,
    step,
)

pytestmark = pytest.mark.gpu

WIDE = [(300, 4096), (4096, 16), (1, 100_003), (64, 3, 7, 7), (1000, 12), (257, 4097)]


@pytest.fixture(autouse=True)
def on_triton():
    with ops.use_backend("triton"):
        yield


def on_gpu(states):
    return [[tensor.cuda() for tensor in state] for state in states]


def take(states, grads, t, **numbers):
    p, m, m_scale, v, v_scale = zip(*states, strict=True)
    ops.adamw8bit_step(p, grads, m, m_scale, v, v_scale, step=t, **NUMBERS | numbers)


def both(states, grads, t, **numbers):
    """A step of `states` on the GPU and of the reference on the CPU, from the same state."""
    theirs = [[tensor.cpu() for tensor in state] for state in states]
    on_cpu = [grad.cpu() for grad in grads]
    moved = [exact_p(*pair, t, **numbers) for pair in zip(theirs, on_cpu, strict=True)]
    step(reference, theirs, on_cpu, t, **numbers)
    take(states, grads, t, **numbers)
    for ours, its, p in zip(states, theirs, moved, strict=True):
        assert torch.equal(ours[0].cpu(), p), (list(p.shape), p.dtype)
        for mine, other in zip(ours[1:], its[1:], strict=True):
            assert torch.equal(mine.cpu(), other), (list(p.shape), p.dtype)


def test_triton_is_what_runs():
    p = torch.zeros(3, 5, device="cuda")
    lists = [[tensor] for tensor in (p, p, *ops.adamw8bit_state(p))]
    assert "triton: runs" in ops.explain("adamw8bit_step", *lists, *NUMBERS.values(), 1)


def test_one_list_of_all_dtypes_and_shapes(generator):
    params = [torch.randn(s, generator=generator).to(d) for d in DTYPES for s in SHAPES + WIDE]
    states = on_gpu([fresh(p) for p in params])
    for t in range(1, 13):
        grads = [random_grad(p, generator, t).cuda() for p in params]  # elsewhere at each step
        if t % 2:
            grads = [g.mT.contiguous().mT if g.dim() > 1 else g for g in grads]
        both(states, grads, t)


def test_codes_beside_every_midpoint():
    for grad in near_midpoints():
        states = on_gpu([fresh(torch.zeros_like(grad))])
        both(states, [grad.cuda()], 1, beta1=0.0, beta2=0.0)


def test_codes_of_sixteen_million_values(generator):
    """Of all magnitudes that have codes of their own, and some that have none."""
    grad = torch.randn(4096, 4096, generator=generator)
    grad *= 10 ** (-9 * torch.rand(4096, 4096, generator=generator))
    states = on_gpu([fresh(torch.zeros_like(grad))])
    both(states, [grad.cuda()], 1, beta1=0.0)


@pytest.mark.parametrize("count", [1, 16, 700])
def test_any_number_of_tensors_at_any_address(count, generator):
    """Parts of one buffer, each an odd number of elements after the one before."""
    sizes = [1 + i % 300 for i in range(count)]
    for dtype in DTYPES:
        flat = torch.randn(sum(sizes), generator=generator).cuda().to(dtype)
        params = list(flat.split(sizes))
        states = [fresh(p) for p in params]
        grads = [random_grad(p.cpu(), generator, 1).cuda() for p in params]
        both(states, grads, 1)


def test_the_same_bits_twice(generator):
    start = [torch.randn(s, generator=generator) for s in WIDE]
    runs = [on_gpu([fresh(p) for p in start]) for _ in range(2)]
    for t in range(1, 4):
        grads = [random_grad(p, generator, t).cuda() for p in start]
        for states in runs:
            take(states, grads, t)
    for one, other in zip(*runs, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_and_stays_in_its_block(bad, generator):
    start, grad = (torch.randn(3, 600, generator=generator) for _ in range(2))
    sound, spoilt = on_gpu([fresh(start)]), on_gpu([fresh(start)])
    for t in (1, 2):
        wrong = grad.clone()
        if t == 1:
            wrong[1, 300] = bad
        take(sound, [grad.cuda()], t)
        take(spoilt, [wrong.cuda()], t)
    touched = torch.zeros(3, 600, dtype=torch.bool, device="cuda")
    touched[1, 256:512] = True
    assert spoilt[0][0][touched].isnan().all()
    assert torch.equal(spoilt[0][0][~touched], sound[0][0][~touched])


def test_no_parameters_and_empty_ones():
    ops.adamw8bit_step([], [], [], [], [], [], step=1, **NUMBERS)
    states = [fresh(torch.zeros(shape, device="cuda")) for shape in ((0, 5), (5, 0), (0,))]
    take(states, [state[0].clone() for state in states], 1)


def test_autograd_is_told(generator):
    p = torch.randn(3, 40, generator=generator).cuda().requires_grad_()
    loss = (p * p).sum()
    take([fresh(p)], [torch.ones(3, 40, device="cuda")], 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_beside_parameters_and_state_is_a_table(generator):
    states = [fresh(torch.zeros(4096, 4096, device="cuda", dtype=torch.bfloat16))]
    grads = [torch.ones_like(states[0][0])]
    take(states, grads, 1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    take(states, grads, 2)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


def test_a_cuda_graph_is_refused_with_a_reason():
    states = [fresh(torch.zeros(8, 8, device="cuda"))]
    grads = [torch.ones(8, 8, device="cuda")]
    take(states, grads, 1)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(BackendError, match="one step"), torch.cuda.graph(graph):
        grads[0].add_(1)  # a graph of nothing would be warned of
        take(states, grads, 2)
