"""Where the state of paged optimizers lies: chunks on the device, in host memory or in a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowrank.errors import ConfigError, TrainingError

from .budget import Budget, Memory
from .homes import Homes
from .rings import Away, DeviceRing, Ring, Use, Visit
from .streams import streams_of
from .tiers import Home, anonymous
from .workers import Workers

logger = logging.getLogger("lowrank.optim")

LARGEST, SMALLEST = 8 << 20, 64 << 10  # bytes of a chunk
SHARE = 6  # one chunk takes this part of a budget that is not large: two may share it
CALM_STEPS = 50  # without a shortage before chunks come back; twice as many each time they do


@dataclass(eq=False)
class _Chunk:
    size: int
    near: bool
    memory: Tensor | None = None  # on the device, if near and not blank
    home: Home | None = None  # if not near; a page of the file stays with the chunk
    blank: bool = True


class PageStore:
    """Chunks of bytes on `device` as far as its budget goes, the others at home on the host.

    `device_budget` is what chunks and the slots that they pass through take on the device together;
    `host_budget` what they take in the host's memory. What fits neither is in a file without a name
    in `page_dir`. On a CPU both budgets are of the same memory, and the smaller counts. Without
    budgets everything is on the device until its memory is short.
    """

    def __init__(
        self,
        device: torch.device,
        device_budget: Budget,
        host_budget: Budget,
        page_dir: str | Path | None = None,
    ) -> None:
        self.device = device
        self.chunk_bytes = chunk_bytes(device_budget, host_budget)
        self._streams = streams_of(device)
        self._budget, self._name = device_budget, "device_budget"
        if self._streams is None and host_budget.limit < device_budget.limit:
            self._budget, self._name = host_budget, "host_budget"
        self._homes = Homes(self._streams is not None, host_budget, page_dir, self.chunk_bytes)
        self._slots = self._homes.slots
        if self._streams is None:
            self._slots = max(2, min(self._slots, torch.get_num_threads()))
        self._memory = Memory(device)
        self._chunks: list[_Chunk] = []
        self._ring: Ring | None = None
        self._process = os.getpid()
        self._failed, self._stuck = "", False
        self._calm, self._patience = 0, CALM_STEPS

    def add(self, sizes: Sequence[int]) -> range:
        """The numbers of new chunks of `sizes` bytes, at most `chunk_bytes` each.

        What will not be on the device has its home from now on: raises ConfigError where there is
        no room, and has added none of them then.
        """
        self._check()
        near = [True] * len(sizes)
        homes: list[Home] = []
        if self._ring is not None or not self._budget.take(self, sum(sizes)):
            self._open_ring()
            near = [self._budget.take(self, size) for size in sizes]
            try:
                homes = self._homes.new([s for s, n in zip(sizes, near, strict=True) if not n])
            except BaseException:
                self._budget.give(self, sum(s for s, n in zip(sizes, near, strict=True) if n))
                raise
        first, left = len(self._chunks), iter(homes)
        for size, is_near in zip(sizes, near, strict=True):
            self._chunks.append(_Chunk(size, is_near, home=None if is_near else next(left)))
        return range(first, len(self._chunks))

    def walk(self, numbers: Sequence[int], use: Use) -> None:
        """Give `use` the chunks of these numbers, a few at a time, with their memory on the device.

        What it computes with that may change it. Chunks at home come ahead of their turn and go
        back after it. On a CPU several threads may be in `use` at once, with other chunks.
        """
        self._check()
        chunks = self._chunks
        self._allocate([chunks[i] for i in numbers])
        if not all(chunks[i].near for i in numbers):
            self._open_ring()  # there is none yet if memory for it was short when they went home
        near, away = [], []
        for i in numbers:
            memory, home = chunks[i].memory, chunks[i].home
            if chunks[i].near:
                assert memory is not None
                near.append(Visit(i, memory, chunks[i].blank))
            else:
                assert home is not None
                away.append(Away(i, home, chunks[i].blank))

        def written(visits: list[Visit]) -> None:
            use(visits)
            for visit in visits:
                chunks[visit.chunk].blank = False

        if not away:
            written(near)
            return
        assert self._ring is not None
        try:
            self._ring.walk(near, away, written)
        except OSError as error:
            raise self._lost(error) from error

    def shrink(self, nbytes: int | None) -> int:
        """Move chunks home until `nbytes` of the device are free or only a ring is left there.

        None: all of them. Returns the bytes that are free now and were not before.
        """
        self._check()
        ring = 0 if self._ring is not None else self._slots * self.chunk_bytes
        held = sum(chunk.size for chunk in self._chunks if chunk.near)
        if held <= ring:
            return 0
        freed = self._move_home(held if nbytes is None else nbytes + ring)
        if self._ring is None:
            self._open_ring()
            freed -= self._slots * self.chunk_bytes
        self._calm = 0
        return freed

    def relieve(self, nbytes: int | None) -> int:
        """`shrink`, where 0 and a warning say that what is on the device has no other home."""
        try:
            freed = self.shrink(nbytes)
        except ConfigError as error:
            self._stuck = True
            logger.warning("memory of %s is short, and %s", self.device, error)
            return 0
        if freed:
            logger.info(
                "memory of %s is short: %s bytes of optimizer state left it",
                self.device,
                f"{freed:,}",
            )
        return freed

    def settle(self) -> None:
        """After a step: move chunks home if memory is short, or back once it long was not."""
        left = self._memory.left()
        if left < 0:
            self._calm = 0
            if not self._stuck:
                self.relieve(-left)
            return
        self._calm += 1
        if self._calm < self._patience or self._ring is None:
            return
        self._calm = 0
        if self._move_back(left // 2):
            self._patience *= 2  # memory that is short again and again is not asked so often

    def read(self, number: int) -> Tensor | None:
        """A copy of a chunk in the host's memory; None if it was never written."""
        self._check()
        chunk = self._chunks[number]
        if chunk.blank:
            return None
        with self._at_home():
            if chunk.near:
                assert chunk.memory is not None
                return chunk.memory.to("cpu", copy=True)
            assert chunk.home is not None
            copy = torch.empty(chunk.size, dtype=torch.uint8, device="cpu")
            chunk.home.get(copy)
            return copy

    def write(self, number: int, content: Tensor) -> None:
        """Put `content`, uint8 of the chunk's size in the host's memory, into a chunk."""
        self._check()
        chunk = self._chunks[number]
        self._allocate([chunk])
        with self._at_home():
            if chunk.near:
                assert chunk.memory is not None
                chunk.memory.copy_(content)
            else:
                assert chunk.home is not None
                chunk.home.put(content)
        chunk.blank = False

    def _lost(self, error: OSError | str) -> TrainingError:
        """What to raise now, and whenever these pages are asked for anything again."""
        self._failed = str(error)
        return TrainingError(f"optimizer state was lost: {error}; go on from the last checkpoint")

    @contextmanager
    def _at_home(self) -> Iterator[None]:
        """While chunks at home are read or written: what cannot be is lost."""
        try:
            if self._ring is not None:
                self._ring.drain()
            yield
        except OSError as error:
            raise self._lost(error) from error

    def _check(self) -> None:
        if self._failed:
            raise self._lost(self._failed)
        if self._homes.may_file and os.getpid() != self._process:
            raise TrainingError(
                f"this optimizer's pages belong to process {self._process}, which forked this one: "
                "make the optimizer in the process that steps it"
            )

    def _allocate(self, chunks: Sequence[_Chunk]) -> None:
        """Memory for chunks that are to be on the device; where that is short, they go home."""
        for chunk in chunks:
            while chunk.near and chunk.memory is None:
                try:
                    chunk.memory = self._new(chunk.size)
                except torch.OutOfMemoryError:
                    if not self.shrink(sum(c.size for c in chunks if c.near and c.memory is None)):
                        raise

    def _new(self, nbytes: int) -> Tensor:
        if self._streams is None:
            return anonymous(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _open_ring(self) -> None:
        """Make room for the slots, of this store's chunks first, then of others'."""
        if self._ring is not None:
            return
        missing = self._budget.taken + self._slots * self.chunk_bytes - self._budget.limit
        if missing > 0:
            self._move_home(int(missing))
        self._slots = self._budget.slots(self, self.chunk_bytes, self._name, self._slots)
        if self._streams is None:
            self._ring = Workers(self._slots)
            return
        try:
            slots = [self._new(self.chunk_bytes) for _ in range(self._slots)]
        except torch.OutOfMemoryError:
            self._budget.give(self, self._slots * self.chunk_bytes)
            raise
        self._ring = DeviceRing(self._streams, slots, self._homes.staging)

    def _close_ring(self) -> None:
        assert self._ring is not None
        self._ring.drain()
        self._ring = None
        self._budget.give(self, self._slots * self.chunk_bytes)

    def _move_home(self, nbytes: int) -> int:
        """The last chunks on the device, until they were `nbytes`; returns what they were."""
        moved: list[_Chunk] = []
        for chunk in reversed(self._chunks):
            if sum(c.size for c in moved) >= nbytes:
                break
            if chunk.near:
                moved.append(chunk)
        homeless = [chunk for chunk in moved if chunk.home is None]
        for chunk, home in zip(homeless, self._homes.new([c.size for c in homeless]), strict=True):
            chunk.home = home
        for chunk in moved:
            assert chunk.home is not None
            if chunk.memory is not None and not chunk.blank:
                chunk.home.put(chunk.memory)  # and wait: the memory is somebody else's after this
            chunk.memory, chunk.near = None, False
            self._budget.give(self, chunk.size)
        if self._streams is None:
            self._homes.sync()  # else the page cache would have what the process gave
        return sum(chunk.size for chunk in moved)

    def _move_back(self, nbytes: int) -> bool:
        """Chunks at home to the device, as far as `nbytes` and the budget go; whether any went."""
        assert self._ring is not None
        self._ring.drain()
        away = [chunk for chunk in self._chunks if not chunk.near]
        moved = 0
        for chunk in away:
            nbytes -= chunk.size
            if nbytes < 0 or not self._budget.take(self, chunk.size):
                break
            assert chunk.home is not None
            try:
                chunk.memory, chunk.near = self._new(chunk.size), True
            except torch.OutOfMemoryError:  # what is free is in pieces that are too small
                self._budget.give(self, chunk.size)
                break
            if not chunk.blank:
                chunk.home.get(chunk.memory)
            if not chunk.home.mapped:  # a place in the file stays its own
                self._homes.free(chunk.home)
                chunk.home = None
            moved += 1
        if moved == len(away):
            self._close_ring()
        return moved > 0


def chunk_bytes(*budgets: Budget) -> int:
    """What a chunk may take: 8 MiB, or less of a budget of less than six such."""
    limit = min(budget.limit for budget in budgets)
    if limit < 2 * SMALLEST:
        raise ConfigError(
            f"budget: expected at least {2 * SMALLEST:,} bytes, two chunks; got {limit:,}"
        )
    return int(max(SMALLEST, min(LARGEST, limit // SHARE // SMALLEST * SMALLEST)))
