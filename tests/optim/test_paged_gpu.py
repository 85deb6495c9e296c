"""Paged optimizers on a GPU: the bits of the resident twin, in the memory that was allowed."""

from __future__ import annotations

import pytest
import torch

from lowrank.optim import AdamW, AdamW8bit, Lion8bit, PagedAdamW, PagedAdamW8bit, PagedLion8bit

from .support import assert_same, assert_same_state, give_gradients, parameters, twins

pytestmark = pytest.mark.gpu

CHUNK = 64 * 1024
SHAPES = [(3000, 1024), (33,), (200, 300), (1_500_000,), (20_000, 16)]
BUDGETS = {
    "none": {},
    "least": {"device_budget": 2 * CHUNK},
    "a part": {"device_budget": 4 << 20},
    "host too": {"device_budget": 1 << 20, "host_budget": 2 << 20},
    "file alone": {"device_budget": 1 << 20, "host_budget": 1 << 20},
}
PAIRS = [(PagedAdamW8bit, AdamW8bit), (PagedAdamW, AdamW), (PagedLion8bit, Lion8bit)]


def on_gpu(dtype=torch.float32):
    return [torch.nn.Parameter(p.detach().cuda()) for p in parameters(SHAPES, dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].__name__)
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_steps_and_states_are_those_of_the_resident_twin(pair, budget, dtype, tmp_path):
    ours = on_gpu(dtype)
    theirs = twins(ours)
    a = pair[0](ours, lr=1e-2, weight_decay=0.1, page_dir=tmp_path, **budget)
    b = pair[1](theirs, lr=1e-2, weight_decay=0.1)
    for step in range(12):
        give_gradients(ours, theirs, none=(2,) if step == 1 else ())
        a.step()
        b.step()
        if step == 5:
            a.evict()
        if step == 8:
            a.load_state_dict(a.state_dict())
    assert_same(ours, theirs)
    assert_same_state(a.state_dict(), b.state_dict())


def test_memory_of_the_device_stays_within_the_budget(tmp_path):
    params = [torch.nn.Parameter(torch.zeros(4096, 4096, device="cuda")) for _ in range(8)]
    give_gradients(params)
    state, budget = 2 * 8 * 4096 * 4096, 32 << 20
    optimizer = PagedAdamW8bit(params, device_budget=budget, page_dir=tmp_path)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    # beside it the kernel's tables of addresses and codes
    assert torch.cuda.max_memory_allocated() - before <= budget + (4 << 20) < state


def test_a_step_does_not_wait_for_the_device():
    params = on_gpu()
    optimizer = PagedAdamW8bit(params, device_budget=1 << 20)
    for _ in range(3):  # homes are made, kernels compiled
        give_gradients(params)
        optimizer.step()
    give_gradients(params)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_evicted_memory_is_free_for_others():
    params = [torch.nn.Parameter(torch.zeros(4096, 4096, device="cuda")) for _ in range(4)]
    give_gradients(params)
    optimizer = PagedAdamW8bit(params)
    optimizer.step()
    before = torch.cuda.memory_allocated()
    freed = optimizer.evict()
    assert freed > 0.7 * 2 * 4 * 4096 * 4096
    assert before - torch.cuda.memory_allocated() == pytest.approx(freed, rel=0.05)
    optimizer.step()


def test_another_stream_may_step(tmp_path):
    ours = on_gpu()
    theirs = twins(ours)
    a = PagedAdamW8bit(ours, lr=1e-2, device_budget=1 << 20, page_dir=tmp_path)
    b = AdamW8bit(theirs, lr=1e-2)
    side = torch.cuda.Stream()
    for step in range(6):
        give_gradients(ours, theirs)
        stream = side if step % 2 else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            a.step()
        torch.cuda.default_stream().wait_stream(stream)
        b.step()
    torch.cuda.synchronize()
    assert_same(ours, theirs)
