"""On a CPU several threads step chunks at once: to the same bits, and nobody else notices."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lowrank.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedLion8bit

from .support import assert_same, assert_same_state, give_gradients, parameters, twins

LEAST = 2 * 64 * 1024  # bytes: two chunks
ROOMY = 6 * 64 * 1024  # three at a time, and others stay
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}


@pytest.fixture
def torch_threads():
    """torch.set_num_threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def threads_elsewhere() -> int:
    """What a thread that begins now computes with."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("budget", [LEAST, ROOMY])
@pytest.mark.parametrize(
    "pair", [(PagedAdamW8bit, AdamW8bit), (PagedAdamW, AdamW)], ids=["8bit", "32bit"]
)
def test_any_number_of_threads_steps_as_the_resident_twin(pair, budget, tmp_path, torch_threads):
    ours = parameters()
    theirs = twins(ours)
    a = pair[0](ours, host_budget=budget, page_dir=tmp_path, **OPTIONS)
    b = pair[1](theirs, **OPTIONS)
    for threads in (2, 1, 3, 5, 2):
        torch_threads(threads)
        give_gradients(ours, theirs, none=(1,) if threads == 3 else ())
        a.step()
        assert torch.get_num_threads() == threads_elsewhere() == threads
        torch_threads(1)
        b.step()
        assert_same(ours, theirs)
    assert_same_state(a.state_dict(), b.state_dict())


def test_pieces_of_what_is_not_contiguous_are_all_written(tmp_path, torch_threads):
    """Each piece is stepped in a copy of its whole parameter."""
    torch_threads(3)
    ours = [nn.Parameter(torch.randn(600, 500).t()), nn.Parameter(torch.randn(700, 300).t())]
    theirs = [nn.Parameter(p.detach().contiguous()) for p in ours]
    a = PagedAdamW8bit(ours, host_budget=ROOMY, page_dir=tmp_path, **OPTIONS)
    b = AdamW8bit(theirs, **OPTIONS)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            g = torch.randn(p.shape[1], p.shape[0])
            p.grad, q.grad = g.t(), g.t().contiguous()
        a.step()
        b.step()
        assert_same(ours, theirs)


def stepping(monkeypatch, optimizer, step):
    """Its rule calls `step` from now on."""
    monkeypatch.setattr(optimizer, "rule", dataclasses.replace(optimizer.rule, step=step))


@pytest.mark.parametrize("threads, shares", [(2, [1, 1]), (3, [1, 1, 1]), (5, [1, 2, 2])])
def test_chunks_are_stepped_at_once_by_shares_of_the_threads(
    threads, shares, tmp_path, monkeypatch, torch_threads
):
    torch_threads(threads)
    met = threading.Barrier(len(shares))
    seen: dict[int, int] = {}

    def step(*args, **options):
        if threading.get_ident() not in seen:
            seen[threading.get_ident()] = torch.get_num_threads()
            met.wait(60)

    ours = parameters([(900, 512)])
    stepping(monkeypatch, PagedLion8bit, step)
    a = PagedLion8bit(ours, host_budget=ROOMY, page_dir=tmp_path)
    give_gradients(ours)
    a.step()
    assert sorted(seen.values()) == shares


def test_one_thread_of_torch_steps_one_chunk_at_a_time(tmp_path, monkeypatch, torch_threads):
    torch_threads(1)
    alone = threading.Lock()

    def step(*args, **options):
        assert alone.acquire(blocking=False)
        time.sleep(0.002)
        alone.release()

    ours = parameters([(900, 512)])
    stepping(monkeypatch, PagedLion8bit, step)
    a = PagedLion8bit(ours, host_budget=ROOMY, page_dir=tmp_path)
    give_gradients(ours)
    a.step()


@pytest.mark.parametrize("whose", ["of a worker", "of the caller"])
def test_an_interrupt_stops_all_threads_and_leaves_pages_that_work(
    whose, tmp_path, monkeypatch, torch_threads
):
    torch_threads(3)
    ours = parameters([(900, 512), (33,), (700, 512)])
    theirs = twins(ours)
    a = PagedAdamW8bit(ours, host_budget=ROOMY, page_dir=tmp_path)
    b = AdamW8bit(theirs)
    give_gradients(ours, theirs)
    a.step()
    b.step()
    saved = a.state_dict()
    calls, nobody_yet, caller_left = [], threading.Lock(), threading.Event()

    def step(*args, **options):
        calls.append(args)
        is_first = nobody_yet.acquire(blocking=False)
        if is_first and whose == "of a worker":
            raise KeyboardInterrupt
        if is_first:
            time.sleep(0.2)  # the caller waits by then
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        caller_left.wait(0.5)  # as if it took long

    with monkeypatch.context() as patched:
        stepping(patched, PagedAdamW8bit, step)
        with pytest.raises(KeyboardInterrupt):
            a.step()
    many = len(calls)
    caller_left.set()
    assert many <= 12  # what had been begun, of 26
    assert_same_state(a.state_dict(), saved)
    give_gradients(ours, theirs)
    a.step()
    b.step()
    assert len(calls) == many
    assert_same(ours, theirs)
    assert_same_state(a.state_dict(), b.state_dict())
