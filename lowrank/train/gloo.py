"""What torch leaves to be done about groups of processes that talk by gloo.

Weights in parts hold on to the group that gathers them for as long as there is a model, so that
destroy_process_group closes none of its connections, and ends none of its threads.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import stat
import time
from pathlib import Path

_LONGEST = 1.0  # seconds that the end of a process may wait


class Connections:
    """The sockets of this process that are opened inside `with`."""

    def __enter__(self) -> Connections:
        self._sockets = _sockets()
        return self

    def __exit__(self, *_: object) -> None:
        self._sockets = dict(_sockets().items() - self._sockets.items())

    def close(self) -> None:
        """Have those at the other ends see them closed, though they stay open here."""
        for number, inode in self._sockets.items():
            with contextlib.suppress(OSError):  # closed already
                if os.fstat(number).st_ino != inode:
                    continue
                with socket.socket(fileno=os.dup(number)) as connection:
                    # of one that waits for connections gloo's thread would not know what to think
                    if not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        connection.shutdown(socket.SHUT_RDWR)


def settle_at_exit() -> None:
    """Before the interpreter ends, let gloo's threads have it for what they still do.

    When all have what was gathered, a thread lets go of the tensors, which are Python's: it waits
    for the interpreter, and where that has ended in the meantime, the process is aborted.
    """
    atexit.unregister(_settle)
    atexit.register(_settle)  # once


def _settle() -> None:
    end, calm = time.monotonic() + _LONGEST, 0
    while calm < 3 and time.monotonic() < end:
        time.sleep(1e-3)  # in which the interpreter is free
        calm = 0 if any(map(_is_at_work, Path("/proc/self/task").glob("*/stat"))) else calm + 1


def _is_at_work(thread: Path) -> bool:
    """Whether it is a thread of gloo's that runs, or would if a processor were free."""
    with contextlib.suppress(OSError):  # ended
        name, _, state = thread.read_text().rpartition(") ")
        return "gloo_runloop" in name and not state.startswith("S")
    return False


def _sockets() -> dict[int, int]:
    """{file descriptor: inode} of the sockets of this process."""
    found = {}
    for number in map(int, os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ()):
        with contextlib.suppress(OSError):  # that of the listing itself
            status = os.fstat(number)
            if stat.S_ISSOCK(status.st_mode):
                found[number] = status.st_ino
    return found
