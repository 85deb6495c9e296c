"""Homes on the host for what is not on the device: RAM within a budget, then a page file."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lowrank.errors import ConfigError

from .budget import SLOTS, Budget
from .rings import StagingRing
from .tiers import Home, HostMemory, PageFile, anonymous


class Homes:
    """For chunks of a GPU: page-locked memory, then the page file. For those of a CPU: the file.

    The file is in `page_dir`, by default TMPDIR or /var/tmp, which unlike /tmp lies on a disk. A
    GPU has one only if there is a `page_dir` or a limit to the budget.
    """

    def __init__(
        self, ram: bool, budget: Budget, page_dir: str | Path | None, chunk_bytes: int
    ) -> None:
        self._ram, self._budget = ram, budget
        self._directory, self._chunk_bytes = page_dir, chunk_bytes
        self._host = HostMemory()
        self._file: PageFile | None = None
        self.may_file = not ram or page_dir is not None or budget.limit < math.inf
        self.slots = SLOTS
        if ram and budget.limit < math.inf:  # for what is between the file and the device
            self.slots = budget.slots(self, chunk_bytes, "host_budget")

    def shrink(self, nbytes: int) -> int:
        """What has its home here has none elsewhere."""
        return 0

    def new(self, sizes: Sequence[int]) -> list[Home]:
        """One for each. Raises ConfigError where there is no room, and takes none then."""
        found = [self._in_ram(size) if self._ram else None for size in sizes]
        left = [size for size, home in zip(sizes, found, strict=True) if home is None]
        try:
            pages = iter(self._pages(left) if left else [])
        except BaseException:
            for home in found:
                if home is not None:
                    self.free(home)
            raise
        return [Home(next(pages), mapped=True) if home is None else home for home in found]

    def free(self, home: Home) -> None:
        """A home in RAM, which is no more needed."""
        self._budget.give(self, home.memory.numel())

    def staging(self) -> StagingRing:
        """Page-locked memory, if there is such, between a GPU and the file."""
        slots = [self._host.new(self._chunk_bytes) for _ in range(self.slots)]
        return StagingRing([anonymous(self._chunk_bytes) if s is None else s for s in slots])

    def sync(self) -> None:
        """The page cache forgets what went into the file."""
        if self._file is not None:
            self._file.sync()

    def _in_ram(self, size: int) -> Home | None:
        if not self._budget.take(self, size):
            return None
        memory = self._host.new(size)
        if memory is None:
            self._budget.give(self, size)
            return None
        return Home(memory)

    def _pages(self, sizes: Sequence[int]) -> list[Tensor]:
        if not self.may_file:
            raise ConfigError(
                f"page_dir: the host has no memory for {sum(sizes):,} bytes of optimizer state; "
                "name a directory for them"
            )
        if self._file is None:
            self._file = PageFile(self._directory or _default_directory())
        return self._file.extend(sizes)


def _default_directory() -> str:
    named = os.environ.get("TMPDIR")
    return named or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir())
