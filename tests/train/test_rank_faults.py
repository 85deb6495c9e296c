"""A process of several is killed, hangs or has no room: the rest say so; a new start goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lowrank.io.safetensors import load_safetensors

from .support import metrics_lines

LOST = "lost the others: one has ended, or has not answered for "


def launch(
    folder, seed: int, parallel: str, fault: str = "none", timeout: float = 120
) -> list[tuple[int, str]]:
    """Status and words of two processes; each is given that long.

    The second is killed when the first has ended, if it would not end by itself.
    """
    folder.mkdir(exist_ok=True)
    store = folder / f"store-{time.monotonic_ns()}"
    words = [sys.executable, "-m", "tests.train.faulty_ranks", str(folder), str(seed)]
    processes, files = [], []
    for rank in range(2):
        files.append((folder / f"{rank}.txt").open("w+"))
        more = [str(rank), "2", str(store), parallel, fault]
        processes.append(subprocess.Popen([*words, *more], stderr=files[-1], stdout=files[-1]))
    alone = fault in ("silent", "fails and lives on")
    try:
        for process in processes[:1] if alone else processes:
            process.wait(timeout=timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    found = []
    for process, file in zip(processes, files, strict=True):
        file.seek(0)
        found.append((process.returncode, file.read()))
        file.close()
    return found


def outcome(folder) -> tuple:
    """What a run leaves that no clock decides."""
    clock = {"seconds", "peak_memory_bytes"}
    lines = metrics_lines(folder / "run")
    lines = [{name: v for name, v in line.items() if name not in clock} for line in lines]
    return lines, sorted(path.name for path in (folder / "run").iterdir())


@pytest.fixture(scope="module")
def seed_of_all() -> int:
    return int(os.environ.get("LOWRANK_TEST_SEED", 0)) or time.monotonic_ns() % (1 << 31)


slow = pytest.mark.slow


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp", marks=slow)])
def parallel(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(tmp_path_factory, seed_of_all, parallel):
    """A run in which nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole")
    for status, said in launch(folder, seed_of_all, parallel):
        assert status == 0, said
    return folder


def assert_goes_on(folder, whole, seed: int, parallel: str) -> None:
    """Started again, the run ends as `whole` did, to the last bit."""
    for status, said in launch(folder, seed, parallel):
        assert status == 0, said
    assert outcome(folder) == outcome(whole)
    first, second = (
        load_safetensors(at / "run" / "adapter_model.safetensors") for at in (folder, whole)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


@pytest.mark.parametrize(
    "fault, killed",
    [
        pytest.param("killed in a step", 1),
        pytest.param("killed in a save", 0),
        pytest.param("the first is killed in a step", 0, marks=slow),
        pytest.param("killed while evaluating", 1, marks=slow),
    ],
)
def test_killed(fault, killed, tmp_path, whole, seed_of_all, parallel):
    begin = time.monotonic()
    found = launch(tmp_path, seed_of_all, parallel, fault)
    assert found[killed][0] == -signal.SIGKILL, found[killed][1]
    status, said = found[1 - killed]
    assert status == 1 and f"rank {1 - killed} of 2 has {LOST}60 seconds (ddp_timeout)" in said
    assert time.monotonic() - begin < 60  # its connection has closed
    assert_goes_on(tmp_path, whole, seed_of_all, parallel)


def test_disk_full(tmp_path, whole, seed_of_all, parallel):
    """On the rank that writes: it names the file, and both end."""
    first, second = launch(tmp_path, seed_of_all, parallel, "disk full")
    assert first[0] == second[0] == 1
    assert "OSError: [Errno 27] File too large: '" in first[1]
    assert f"rank 1 of 2 has {LOST}" in second[1]
    assert_goes_on(tmp_path, whole, seed_of_all, parallel)


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=slow), "fsdp"])
def test_fails_and_lives_on(tmp_path, seed_of_all, parallel):
    """The others lose it at once, though its model in parts holds on to its connections."""
    begin = time.monotonic()
    (status, said), _ = launch(tmp_path, seed_of_all, parallel, "fails and lives on")
    assert status == 1 and f"rank 0 of 2 has {LOST}60 seconds" in said
    assert time.monotonic() - begin < 60


@slow
def test_silent(tmp_path, whole, seed_of_all, parallel):
    """One that neither goes on nor ends is waited for as long as was said."""
    (status, said), _ = launch(tmp_path, seed_of_all, parallel, "silent", timeout=60)
    assert status == 1 and f"rank 0 of 2 has {LOST}5 seconds" in said
    assert_goes_on(tmp_path, whole, seed_of_all, parallel)
