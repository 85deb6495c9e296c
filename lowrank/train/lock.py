"""One run a directory: a lock that the kernel gives back however the process ends."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from lowrank.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: two runs on one directory are then not told apart
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("lowrank.train")

LOCK = ".lock"


class RunLock:
    """Holds `directory`, which it makes, until closed; ConfigError if another run, of this or any
    process, has it, or if it cannot be written.

    The file names the process; it is the lock on it that counts, so one left by a kill is free.
    """

    def __init__(self, directory: Path) -> None:
        self._path, self._handle = directory / LOCK, None
        if fcntl is None:
            return
        while True:
            handle = self._open()
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(handle, 32, 0).decode(errors="replace").strip()
                os.close(handle)
                raise ConfigError(
                    f"output_dir {directory} is in use by another run (process {owner or '?'}): "
                    "name another directory, or wait for it to end"
                ) from None
            except OSError as error:  # a file system that has no locks
                os.close(handle)
                logger.warning("%s cannot be locked: %s", directory, error.strerror)
                return
            if self._is_there(handle):
                break
            os.close(handle)  # its owner removed it as we came
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._handle = handle

    def close(self) -> None:
        """Give the directory back, and leave no file."""
        if self._handle is None:
            return
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)  # while it is held, so that nobody's goes
        os.close(self._handle)
        self._handle = None

    def _open(self) -> int:
        directory = self._path.parent
        try:
            directory.mkdir(parents=True, exist_ok=True)
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(
                f"output_dir {directory} cannot be written: {error.strerror}"
            ) from None

    def _is_there(self, handle: int) -> bool:
        """Whether the file that was locked is still the one of that name."""
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self._path))
        except FileNotFoundError:
            return False


def check_unlocked(directory: Path) -> None:
    """ConfigError if a run has the directory now."""
    if (directory / LOCK).exists():
        RunLock(directory).close()
