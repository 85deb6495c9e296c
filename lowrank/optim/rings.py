"""A few chunks at a time on their way: begun ahead of their use, and brought home behind it.

Every ring answers `begin(home, load)`, which starts to bring what is at home (or, without `load`,
only makes room), `take`, the memory that what is computed next may use, and `give`, which starts
to bring it back. Homes are taken in the order in which they were begun.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from torch import Tensor

from .streams import Streams
from .tiers import Home, drop, populate


class Ring(Protocol):
    """What a store asks of each."""

    def begin(self, home: Home, load: bool) -> None: ...

    def take(self, home: Home) -> Tensor: ...

    def give(self, home: Home) -> None: ...

    def settle(self) -> None: ...

    def drain(self) -> None: ...


class MappedRing:
    """On a CPU a chunk is used where its file is mapped: a thread populates pages, and drops them.

    The thread does one thing after another, so that pages are dropped before others come.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "lowrank-pages")
        self._populated: dict[Home, Future[None]] = {}
        self._dropped: list[Future[None]] = []

    def begin(self, home: Home, load: bool) -> None:
        self._populated[home] = self._thread.submit(populate, home.memory)

    def take(self, home: Home) -> Tensor:
        self._populated.pop(home).result()
        return home.memory

    def give(self, home: Home) -> None:
        self._dropped.append(self._thread.submit(drop, home.memory))

    def settle(self) -> None:
        """After a step no thread works and nothing mapped is resident."""
        for future in self._dropped:
            future.result()
        self._dropped.clear()

    drain = settle


class _Slot:
    """One chunk's worth of memory, and after what it may be written again."""

    def __init__(self, memory: Tensor, free: Any = None) -> None:
        self.memory = memory
        self.free = free
        self.loaded: Any = None  # after what it may be used
        self.load = False


class StagingRing:
    """Page-locked memory between a page file and a GPU, filled ahead and emptied by two threads."""

    def __init__(self, memories: list[Tensor]) -> None:
        self._slots = [_Slot(memory) for memory in memories]
        self._next = 0
        self._at: dict[Home, _Slot] = {}
        self._reader = ThreadPoolExecutor(1, "lowrank-pages-in")
        self._writer = ThreadPoolExecutor(1, "lowrank-pages-out")

    def begin(self, home: Home, load: bool) -> None:
        slot = self._at[home] = self._slots[self._next % len(self._slots)]
        self._next += 1
        free, written = slot.free, home.written
        slot.loaded = self._reader.submit(_read, home, slot.memory, load, free, written)

    def take(self, home: Home) -> Tensor:
        slot = self._at[home]
        slot.loaded.result()
        return slot.memory[: home.memory.numel()]

    def give(self, home: Home, after: Any) -> None:
        """Once the event `after` has happened, the memory goes into the file."""
        slot = self._at.pop(home)
        slot.free = home.written = self._writer.submit(_write, home, slot.memory, after)

    def settle(self) -> None:
        """The threads go on between the steps."""

    def drain(self) -> None:
        for slot in self._slots:
            if slot.free is not None:
                slot.free.result()


def _read(home: Home, memory: Tensor, load: bool, free: Any, written: Any) -> None:
    for future in (free, written):
        if future is not None:
            future.result()
    if load:
        populate(home.memory)
        memory[: home.memory.numel()].copy_(home.memory)
        drop(home.memory)


def _write(home: Home, memory: Tensor, after: Any) -> None:
    after.synchronize()
    populate(home.memory)
    home.memory.copy_(memory[: home.memory.numel()])
    drop(home.memory)


class DeviceRing:
    """Memory of a GPU that chunks at home on the host pass through, on streams of their own."""

    def __init__(
        self, streams: Streams, memories: list[Tensor], staging: Callable[[], StagingRing]
    ) -> None:
        self._streams, self._make_staging = streams, staging
        self._made_staging: StagingRing | None = None
        made = streams.mark()  # what used this memory before may still run
        self._slots = [_Slot(memory, made) for memory in memories]
        self._next = 0
        self._at: dict[Home, _Slot] = {}

    def begin(self, home: Home, load: bool) -> None:
        slot = self._at[home] = self._slots[self._next % len(self._slots)]
        self._next += 1
        slot.load, slot.loaded = load, slot.free
        if home.mapped:
            self._staging().begin(home, load)
        elif load:
            target = slot.memory[: home.memory.numel()]
            slot.loaded = self._streams.load(target, home.memory, slot.free, home.written)

    def take(self, home: Home) -> Tensor:
        slot = self._at[home]
        target = slot.memory[: home.memory.numel()]
        if home.mapped and slot.load:
            slot.loaded = self._streams.load(target, self._staging().take(home), slot.free)
        self._streams.wait(slot.loaded)
        return target

    def give(self, home: Home) -> None:
        slot = self._at.pop(home)
        source, done = slot.memory[: home.memory.numel()], self._streams.mark()
        if home.mapped:
            slot.free = self._streams.save(self._staging().take(home), source, done)
            self._staging().give(home, slot.free)
        else:
            slot.free = home.written = self._streams.save(home.memory, source, done)

    def settle(self) -> None:
        """The streams go on between the steps."""

    def drain(self) -> None:
        """Wait, on the host too, until everything is at home; then the memory may be freed."""
        for slot in self._slots:
            self._streams.wait(slot.free)
            slot.free.synchronize()
        if self._made_staging is not None:
            self._made_staging.drain()

    def _staging(self) -> StagingRing:
        """Made when the first chunk of a page file comes."""
        if self._made_staging is None:
            self._made_staging = self._make_staging()
        return self._made_staging
