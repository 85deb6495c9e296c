"""One run a directory, whichever process it is in, and whatever became of the one before."""

from __future__ import annotations

import errno
import fcntl
import os
import signal

import pytest

from lowrank.errors import ConfigError
from lowrank.train.lock import LOCK, RunLock, check_unlocked

from .faults import in_child


def test_one_has_it_until_it_is_given_back(tmp_path):
    first = RunLock(tmp_path)
    for taken in (RunLock, check_unlocked):
        with pytest.raises(ConfigError, match=rf"in use by another run \(process {os.getpid()}\)"):
            taken(tmp_path)
    assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"
    first.close()
    first.close()
    assert list(tmp_path.iterdir()) == []
    check_unlocked(tmp_path)
    RunLock(tmp_path).close()


def test_of_another_process(tmp_path):
    held = RunLock(tmp_path)

    def other():
        with pytest.raises(ConfigError, match=f"process {os.getppid()}"):
            RunLock(tmp_path)

    assert in_child(other) == 0
    held.close()


def test_a_killed_run_holds_nothing(tmp_path):
    def killed():
        RunLock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    check_unlocked(tmp_path)
    RunLock(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_removed_as_it_was_taken(tmp_path, monkeypatch):
    """Its owner ended between our opening the file and locking it: the file of that name counts."""
    real, times = fcntl.flock, []

    def flock(handle, operation):
        times.append(handle)
        if len(times) == 1:
            (tmp_path / LOCK).unlink()
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    held = RunLock(tmp_path)
    assert len(times) == 2
    with pytest.raises(ConfigError):
        RunLock(tmp_path)
    held.close()


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    RunLock(tmp_path).close()
    assert "cannot be locked: No locks available" in caplog.text
