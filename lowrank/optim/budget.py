"""How many bytes the pages of optimizers may hold, and how many a device has left."""

from __future__ import annotations

import math
import os
import weakref
from typing import Protocol

import torch

from lowrank.errors import ConfigError

SLOTS = 3  # chunks on the way at a time: one comes, one is worked on, one goes
RESERVE = 1 / 50  # of a device's memory: what is left below that is too little


class Holder(Protocol):
    """Who takes bytes of a budget, and may be asked to do with fewer."""

    def shrink(self, nbytes: int) -> int: ...


class Budget:
    """Bytes that all the optimizers which were given it may hold together; None: no limit.

    Two share one: `Budget(2**30)` as the device_budget of both. Who comes later gets what is free,
    and two chunks at the least: the others move some of theirs away for it.
    """

    def __init__(self, limit: int | None) -> None:
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
            raise ConfigError(f"budget: expected a number of bytes or None; got {limit!r}")
        if limit is not None and limit < 0:
            raise ConfigError(f"budget: expected 0 bytes or more; got {limit}")
        self.limit = math.inf if limit is None else limit
        self._held: weakref.WeakKeyDictionary[Holder, int] = weakref.WeakKeyDictionary()

    @property
    def taken(self) -> int:
        """Bytes that optimizers hold; those of one that is no more are free again."""
        return sum(self._held.values())

    def take(self, holder: Holder, nbytes: int) -> bool:
        """Whether so many were left; they are the holder's then."""
        if self.taken + nbytes > self.limit:
            return False
        self._held[holder] = self._held.get(holder, 0) + nbytes
        return True

    def claim(self, holder: Holder, nbytes: int) -> bool:
        """`take`, for which the others make room if they can."""
        for other in list(self._held):
            missing = self.taken + nbytes - self.limit
            if missing > 0 and other is not holder:
                other.shrink(int(missing))
        return self.take(holder, nbytes)

    def slots(self, holder: Holder, nbytes: int, name: str, most: int = SLOTS) -> int:
        """Claim `most` times `nbytes` or else twice; returns how often. `name` is the budget's."""
        for slots in range(most, 1, -1):
            if self.claim(holder, slots * nbytes):
                return slots
        raise ConfigError(
            f"{name}: expected room for two chunks of {nbytes:,} bytes beside what others hold "
            f"of it; got {self.limit:,.0f} bytes, of which {self.taken:,} are taken"
        )

    def give(self, holder: Holder, nbytes: int) -> None:
        """Bytes of the holder are free again."""
        self._held[holder] -= nbytes


class Memory:
    """What a device has left beyond a reserve of a fiftieth of its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
        else:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.reserve = int(total * RESERVE)
        self._retries = 0

    def left(self) -> int:
        """Bytes; below zero is a shortage. Waits for nothing that runs on the device.

        On a GPU it is also a shortage when the allocator had to empty its cache to serve somebody
        since the last call: what is free between two steps says little about their peaks.
        """
        if self.device.type != "cuda":
            return _available() - self.reserve
        retries = torch.cuda.memory_stats_as_nested_dict(self.device).get("num_alloc_retries", 0)
        before, self._retries = self._retries, retries
        if retries > before:
            return -self.reserve
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + cached - self.reserve


def _available() -> int:
    """What the kernel could give without swapping, in bytes."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
