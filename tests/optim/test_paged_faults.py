"""What can go wrong with pages: full disks, unreadable files, kills, forks, scarce memory."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank.errors import ConfigError, TrainingError
from lowrank.optim import AdamW8bit, Budget, PagedAdamW8bit, pages

from .support import assert_same, assert_same_state, give_gradients, parameters, twins

CHUNK = 64 * 1024
LEAST = 2 * CHUNK
SHAPES = [(900, 512), (33,), (700, 512)]  # 1.7 MB of state


def pair(tmp_path, **budget):
    """Parameters, the same again, and an optimizer over each: paged and resident."""
    ours = parameters(SHAPES)
    theirs = twins(ours)
    return ours, theirs, PagedAdamW8bit(ours, page_dir=tmp_path, **budget), AdamW8bit(theirs)


def together(ours, theirs, a, b, steps=1):
    for _ in range(steps):
        give_gradients(ours, theirs)
        a.step()
        b.step()
    assert_same(ours, theirs)


def test_a_full_disk_is_found_before_the_first_step(tmp_path, monkeypatch):
    ours, theirs, a, b = pair(tmp_path, host_budget=LEAST)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    give_gradients(ours, theirs)
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(ConfigError, match=r"has no room for 1,\d+,\d+ bytes .*No space left"):
            a.step()
    assert_same(ours, theirs)  # nothing moved
    a.step()  # there is room now
    b.step()
    assert_same(ours, theirs)


def test_the_kernel_refuses_the_space_too(tmp_path):
    ours, theirs, a, b = pair(tmp_path, host_budget=LEAST)
    give_gradients(ours, theirs)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(ConfigError, match="page_dir: .*File too large"):
            a.step()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same(ours, theirs)
    a.step()
    b.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("page_dir", ["missing", "file"])
def test_a_page_dir_that_cannot_be(page_dir, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="page_dir: expected a directory that can be written"):
        PagedAdamW8bit(parameters(SHAPES), page_dir=tmp_path / page_dir)


def test_pages_that_cannot_be_read_end_the_run_without_killing_it(tmp_path):
    """As on a disk that fails: the file is cut short behind the optimizer's back."""
    before = set(os.listdir("/proc/self/fd"))
    ours, theirs, a, b = pair(tmp_path, host_budget=LEAST)
    together(ours, theirs, a, b)
    cut = 0
    for handle in set(os.listdir("/proc/self/fd")) - before:
        link = f"/proc/self/fd/{handle}"
        if os.path.exists(link) and os.readlink(link).startswith(str(tmp_path)):
            os.truncate(link, 0)
            cut += 1
    assert cut
    give_gradients(ours)
    with pytest.raises(TrainingError, match="optimizer state was lost: .*last checkpoint"):
        a.step()
    for call in (a.step, a.state_dict):
        with pytest.raises(TrainingError, match="optimizer state was lost"):
            call()


def test_killed_in_use_it_leaves_nothing(tmp_path):
    script = f"""
import torch
from lowrank.optim import PagedAdamW8bit
p = torch.nn.Parameter(torch.zeros(2000, 1024))
p.grad = torch.ones_like(p)
optimizer = PagedAdamW8bit([p], host_budget={LEAST}, page_dir={str(tmp_path)!r})
while True:
    optimizer.step()
    print("stepped", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == b"stepped\n"
        assert list(tmp_path.iterdir()) == []
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_may_not_step_and_harms_nobody(tmp_path):
    ours, theirs, a, b = pair(tmp_path, host_budget=LEAST)
    together(ours, theirs, a, b)
    child = os.fork()
    if not child:
        status = 1
        try:
            a.step()
        except TrainingError as error:
            status = 0 if "forked" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    together(ours, theirs, a, b, steps=2)


def test_an_error_in_the_middle_of_a_step_leaves_pages_that_work(tmp_path, monkeypatch):
    ours, theirs, a, b = pair(tmp_path, host_budget=LEAST)
    together(ours, theirs, a, b, steps=2)
    saved = a.state_dict()
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return None

    give_gradients(ours, theirs)
    with monkeypatch.context() as patched:
        rule = dataclasses.replace(PagedAdamW8bit.rule, step=interrupted)
        patched.setattr(PagedAdamW8bit, "rule", rule)
        with pytest.raises(KeyboardInterrupt):
            a.step()
    assert_same_state(a.state_dict(), saved)
    together(ours, theirs, a, b, steps=2)
    assert_same_state(a.state_dict(), b.state_dict())


class Scarce:
    """Memory of which a test says how much is left."""

    free = 1 << 40

    def __init__(self, device: torch.device) -> None:
        self.asked = 0

    def left(self) -> int:
        return Scarce.free


def test_memory_that_is_short_and_is_not_any_more(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pages, "Memory", Scarce)
    monkeypatch.setattr(pages, "LARGEST", CHUNK)
    monkeypatch.setattr(pages, "CALM_STEPS", 2)
    monkeypatch.setattr(Scarce, "free", 1 << 40)
    caplog.set_level("INFO", "lowrank.optim")
    ours, theirs, a, b = pair(tmp_path)
    together(ours, theirs, a, b, steps=2)
    assert not caplog.records
    monkeypatch.setattr(Scarce, "free", -5 * CHUNK)
    together(ours, theirs, a, b)
    assert "memory of cpu is short" in caplog.records[-1].getMessage()
    freed = re.search(r"([\d,]+) bytes", caplog.records[-1].getMessage())[1]
    assert int(freed.replace(",", "")) >= 5 * CHUNK
    before = a.evict()  # all the others
    assert before > 0 and a.evict() == 0
    together(ours, theirs, a, b, steps=2)
    monkeypatch.setattr(Scarce, "free", 1 << 40)
    together(ours, theirs, a, b, steps=4)
    assert a.evict() > before  # they had come back, all of them
    assert_same_state(a.state_dict(), b.state_dict())


def test_memory_is_short_and_so_is_the_disk(tmp_path, monkeypatch, caplog):
    """Nothing but speed was asked of the pages: they stay where they are, and the run goes on."""
    monkeypatch.setattr(pages, "Memory", Scarce)
    monkeypatch.setattr(pages, "LARGEST", CHUNK)
    monkeypatch.setattr(Scarce, "free", -1)
    (tmp_path / "gone").mkdir()
    ours, theirs, a, b = pair(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    together(ours, theirs, a, b, steps=3)
    assert len(caplog.records) == 1 and "page_dir" in caplog.records[0].getMessage()
    assert a.evict() == 0  # who asks for memory is told that there is none
    together(ours, theirs, a, b)


def test_a_directory_in_memory_is_told_of(monkeypatch, caplog):
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        shm = Path("/tmp")
    ours = parameters(SHAPES)
    a = PagedAdamW8bit(ours, host_budget=LEAST, page_dir=shm)
    give_gradients(ours)
    a.step()
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    in_memory = any(mount[1:3] == [str(shm), "tmpfs"] for mount in mounts)
    assert any("lies in memory" in r.getMessage() for r in caplog.records) == in_memory


@pytest.mark.parametrize("threads", [1, 3])
def test_resident_memory_grows_by_no_more_than_the_budget_and_two_chunks(threads, tmp_path):
    state, budget = 34_000_000, 3_400_000
    script = f"""
import torch
from lowrank.optim import PagedAdamW8bit

torch.set_num_threads({threads})

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

def optimizer(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.ones_like(p)
    return PagedAdamW8bit([p], host_budget={budget}, page_dir={str(tmp_path)!r})

optimizer((2000, 1024)).step()  # what is loaded at the first step is not the pages'
made = optimizer((16_400, 1024))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
for _ in range(3):
    made.step()
print(status("VmHWM") - before, sum(s.numel() for s in made.state_dict()["state"][0].values()
                                    if isinstance(s, torch.Tensor)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, elements = map(int, done.stdout.split())
    assert elements > 0.98 * state
    assert grown < budget + 2 * pages.chunk_bytes(Budget(budget)), f"{grown:,} bytes"
