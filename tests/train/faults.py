"""Faults of a disk and of a process: any call that changes files fails, tears or is the last."""

from __future__ import annotations

import builtins
import io
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

# every call of the os module that changes what is on the disk
CALLS = ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "remove", "chmod")


class Files:
    """Stands in for the calls that change files below `root`; `seen` has each as (call, path).

    `on(number, call, path)` is asked before each; what it raises, that call raises. Of a write it
    is asked when half of the bytes are in the file.
    """

    def __init__(self, root: Path, on: Callable[[int, str, str], None] = lambda *_: None) -> None:
        self.root, self.on, self.seen = str(root), on, []
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Files:
        for name in CALLS:
            self.patch.setattr(os, name, self.hooked(name, getattr(os, name)))
        opener = self.opener(io.open)
        self.patch.setattr(io, "open", opener)
        self.patch.setattr(builtins, "open", opener)
        return self

    def __exit__(self, *exception) -> None:
        self.patch.undo()

    def note(self, call: str, path) -> None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fspath(path)
        if os.path.isabs(path) and not path.startswith(self.root):
            return
        self.seen.append((call, path))
        self.on(len(self.seen), call, path)

    def hooked(self, name, original):
        def call(path, *args, **kwargs):
            self.note(name, path)
            return original(path, *args, **kwargs)

        return call

    def opener(self, original):
        def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **rest):
            writes = not isinstance(file, int) and set(mode) & set("wax+")
            if not writes or not os.fspath(file).startswith(self.root):
                return original(file, mode, buffering, encoding, errors, newline, **rest)
            self.note("open", file)
            raw = Torn(self, os.fspath(file), mode.replace("b", "").replace("t", ""))
            binary = raw if buffering == 0 else io.BufferedWriter(raw)
            if "b" in mode:
                return binary
            return io.TextIOWrapper(binary, encoding or "utf-8", errors, newline)

        return opened


class Torn(io.FileIO):
    """A file, half of each write of which is there when `files` hears of it."""

    def __init__(self, files: Files, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self.files = files

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        half = len(view) // 2
        done = super().write(view[:half]) if half else 0
        self.files.note("write", self.name)
        return done + super().write(view[half:])


def last_call(number: int) -> Callable[[int, str, str], None]:
    """For Files: SIGKILL at call `number`."""

    def on(n: int, call: str, path: str) -> None:
        if n == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return on


def failing(number: int, code: int) -> Callable[[int, str, str], None]:
    """For Files: call `number` and those after it raise the error of errno `code`."""

    def on(n: int, call: str, path: str) -> None:
        if n >= number:
            raise OSError(code, os.strerror(code))

    return on


def in_child(work: Callable[[], None], user: int | None = None) -> int:
    """Run `work` in a forked process, as `user` if we may; its status, negative for a signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            if user is not None and os.getuid() == 0:
                os.setuid(user)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
