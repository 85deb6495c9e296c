"""Copies beside computation: no two of them may meet in memory, as a GPU would let them."""

from __future__ import annotations

import pytest
import torch

from lowrank.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, tiers
from lowrank.optim.streams import Streams

from .gpu_on_cpu import Event, Machine
from .support import assert_same, assert_same_state, give_gradients, parameters, twins

CHUNK = 64 * 1024
SHAPES = [(300, 512), (33,), (200, 300), (150_000,)]
# what is on the "GPU", and where the others are: page-locked, in the file, in both
PLACES = {
    "host": {"device_budget": 3 * CHUNK},
    "two slots": {"device_budget": 2 * CHUNK},
    "file": {"device_budget": 4 * CHUNK, "host_budget": 3 * CHUNK},
    "file, two slots": {"device_budget": 3 * CHUNK, "host_budget": 2 * CHUNK},
    "both": {"device_budget": 5 * CHUNK, "host_budget": 6 * CHUNK},
}


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    made.install(monkeypatch)
    return made


def run(paged, resident, machine, tmp_path, budget, steps=3):
    """Both optimizers for some steps; the states of both."""
    ours = parameters(SHAPES)
    theirs = twins(ours)
    a = paged(ours, lr=1e-2, page_dir=tmp_path, **budget)
    b = resident(theirs, lr=1e-2)
    for step in range(steps):
        give_gradients(ours, theirs, none=(2,) if step == 1 else ())
        with machine:
            a.step()
        b.step()
        if step == 1:
            with machine:
                a.evict()
    assert_same(ours, theirs)
    with machine:
        saved = a.state_dict()
    assert_same_state(saved, b.state_dict())


@pytest.mark.parametrize(
    "pair", [(PagedAdamW8bit, AdamW8bit), (PagedAdamW, AdamW)], ids=["8bit", "32bit"]
)
@pytest.mark.parametrize("budget", PLACES.values(), ids=PLACES)
def test_no_two_accesses_race(pair, budget, machine, tmp_path):
    run(*pair, machine, tmp_path, budget)
    assert machine.races == []
    threads = {"lowrank-pages-in", "lowrank-pages-out"} if "host_budget" in budget else set()
    assert {"stream 1", "stream 2", "default stream"} | threads <= machine.seen


# "load" not with a file: what was read from it has waited for what was written before
@pytest.mark.parametrize(
    "forgotten, place",
    [("wait", "host"), ("load", "host"), ("save", "host"), ("load", "both"), ("save", "both")]
    + [("wait", "file"), ("save", "file")],
)
def test_a_wait_that_is_forgotten_is_found(forgotten, place, machine, tmp_path, monkeypatch):
    whole = getattr(Streams, forgotten)
    without = {
        "wait": lambda self, event: None,
        "load": lambda self, target, source, *after: whole(self, target, source),
        "save": lambda self, target, source, *after: whole(self, target, source),
    }
    monkeypatch.setattr(Streams, forgotten, without[forgotten])
    run(PagedAdamW8bit, AdamW8bit, machine, tmp_path, PLACES[place])
    assert machine.races != []


def test_a_step_waits_for_nothing_on_the_host(machine, tmp_path, monkeypatch):
    """But for a file, which somebody has to read: then it is the threads that wait."""
    waited = []
    monkeypatch.setattr(Event, "synchronize", lambda event: waited.append(event))
    params = parameters(SHAPES)
    a = PagedAdamW8bit(params, device_budget=3 * CHUNK)
    for _ in range(3):
        give_gradients(params)
        with machine:
            a.step()
    assert waited == [] and "stream 2" in machine.seen


def test_page_locked_memory_that_runs_out(machine, tmp_path, monkeypatch, caplog):
    """Pageable memory takes its place, which is said once; the bits are the same."""
    left = [2]

    def scarce(nbytes: int) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(tiers, "pinned", scarce)
    run(PagedAdamW8bit, AdamW8bit, machine, tmp_path, PLACES["host"])
    said = [r.getMessage() for r in caplog.records if "page-locked" in r.getMessage()]
    assert len(said) == 1 and "out of memory" in said[0] and "\n" not in said[0]
