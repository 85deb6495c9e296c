"""Memory that pages lie in: of the process, page-locked for a GPU, or mapped from a file."""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.errors import ConfigError

logger = logging.getLogger("lowrank.optim")

_POPULATE_WRITE = 23  # Linux 5.14; mmap has no name for it
_IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}  # statfs(2)


@dataclass(eq=False)
class Home:
    """Where a chunk lies while it is not on its device: uint8 [size], in RAM or of a page file."""

    memory: Tensor
    mapped: bool = False
    written: Any = None  # after which what was last brought home is there: an event or a future

    def get(self, target: Tensor) -> None:
        """Copy to `target`, at once."""
        if self.mapped:
            populate(self.memory)
        target.copy_(self.memory)
        if self.mapped:
            drop(self.memory)

    def put(self, source: Tensor) -> None:
        """Copy from `source`, at once."""
        if self.mapped:
            populate(self.memory)
        self.memory.copy_(source)
        if self.mapped:
            drop(self.memory)


def anonymous(nbytes: int) -> Tensor:
    """uint8 [nbytes], zero, that goes back to the system at once when it is no longer needed."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags), dtype=torch.uint8)


def pinned(nbytes: int) -> Tensor:
    """uint8 [nbytes], page-locked. RuntimeError where the system has no more of it."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


class HostMemory:
    """RAM for what is not on a GPU: page-locked, and pageable once the system has no more of it."""

    def __init__(self) -> None:
        self._may_pin = True

    def new(self, nbytes: int) -> Tensor | None:
        """uint8 [nbytes]; None where there is no memory of either kind."""
        if self._may_pin:
            try:
                return pinned(nbytes)
            except RuntimeError as error:
                self._may_pin = False
                logger.warning(
                    "no more page-locked memory (%s): optimizer state goes to pageable memory, "
                    "which is copied more slowly",
                    str(error).splitlines()[0],
                )
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        except RuntimeError:
            return None


class PageFile:
    """Scratch space in a file that has no name: nothing of it is left when the process ends.

    All of it is allocated before it is mapped: a disk that is full is then an exception now, where
    it would be a SIGBUS later.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._handle = _nameless(directory)
        weakref.finalize(self, os.close, self._handle)
        self.size = 0
        kind = filesystem(self._handle)
        if kind is not None:
            logger.warning(
                "page_dir: %s is a %s, which lies in memory: paging there frees none; name a "
                "directory on a disk",
                directory,
                kind,
            )

    def extend(self, sizes: Sequence[int]) -> list[Tensor]:
        """As many mapped pages, uint8 [size], zero. Raises ConfigError and stays as it was."""
        places, length = [], 0
        for size in sizes:
            places.append(length)
            length += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if not length:
            return [torch.empty(0, dtype=torch.uint8, device="cpu") for _ in sizes]
        try:
            os.posix_fallocate(self._handle, self.size, length)
        except OSError as error:
            os.ftruncate(self._handle, self.size)
            raise ConfigError(
                f"page_dir: {self.directory} has no room for {length:,} bytes of optimizer state "
                f"({error.strerror}); name another directory, or raise the budget"
            ) from error
        mapped = mmap.mmap(self._handle, length, offset=self.size)
        self.size += length
        memory = torch.frombuffer(mapped, dtype=torch.uint8)
        return [memory[at : at + size] for at, size in zip(places, sizes, strict=True)]

    def sync(self) -> None:
        """Write what is dirty to the disk, and let the page cache forget it."""
        os.fdatasync(self._handle)
        os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_DONTNEED)


def check_page_dir(directory: str | Path) -> None:
    """ConfigError if there can be no page file in `directory`."""
    os.close(_nameless(directory))


def _nameless(directory: str | Path) -> int:
    """A new file in `directory`, as its handle."""
    if not hasattr(os, "posix_fallocate") or not hasattr(mmap.mmap, "madvise"):
        raise ConfigError(f"page_dir: paging to {directory} needs Linux; raise the budget")
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise ConfigError(
            f"page_dir: expected a directory that can be written; got {directory}: {error.strerror}"
        ) from error


def populate(memory: Tensor) -> None:
    """Bring the mapped pages of `memory` in, so that nobody waits for them later.

    A page that cannot be read is an OSError here, where it would be a SIGBUS later.
    """
    status = _madvise(memory, _POPULATE_WRITE)
    if status == 0:
        return
    error = ctypes.get_errno()
    if error in (22, 38):  # EINVAL, ENOSYS: a kernel that is older; reading ahead is what it has
        _madvise(memory, mmap.MADV_WILLNEED)
        return
    raise OSError(error, f"the page file cannot be read: {os.strerror(error)}")


def drop(memory: Tensor) -> None:
    """Take the mapped pages of `memory` out of the process; the file keeps what they hold."""
    _madvise(memory, mmap.MADV_DONTNEED)


def filesystem(handle: int) -> str | None:
    """The name of the file system in memory that an open file lies on; None: on another kind."""
    answer = (ctypes.c_long * 32)()  # struct statfs begins with its type
    if _libc().fstatfs(handle, ctypes.byref(answer)) != 0:
        return None
    return _IN_MEMORY.get(answer[0] & 0xFFFFFFFF)


def _madvise(memory: Tensor, advice: int) -> int:
    # mmap.madvise would hold the interpreter's lock meanwhile.
    return _libc().madvise(memory.data_ptr(), memory.numel(), advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
    return libc
