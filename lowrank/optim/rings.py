"""A few chunks at a time on their way to a GPU: begun ahead of their use, brought home behind it.

`begin(home, load)` starts to bring what is at home (or, without `load`, only makes room), `take` is
the memory that what is computed next may use, and `give` starts to bring it back. Homes are taken
in the order in which they were begun.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .streams import Streams
from .tiers import Home, drop, populate


class Visit(NamedTuple):
    """A chunk while its memory may be read and written on the device; `blank`: never written."""

    chunk: int
    memory: Tensor
    blank: bool
    stays: bool = False  # the memory is that of every visit to this chunk


class Away(NamedTuple):
    """A chunk that is to be visited, and is at home."""

    chunk: int
    home: Home
    blank: bool


Use = Callable[[list[Visit]], None]


class Ring(Protocol):
    """What a store asks of each: Workers on a CPU, DeviceRing on a GPU."""

    def walk(self, near: Sequence[Visit], away: Sequence[Away], use: Use) -> None:
        """Give `use` all of these, a few at a time, and bring home those that were away."""

    def drain(self) -> None:
        """Wait until everything is at home."""


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

    def walk(self, near: Sequence[Visit], away: Sequence[Away], use: Use) -> None:
        """Those that are away in turn, the near spread among them."""
        turns = len(away)
        begun = taken = given = 0
        try:
            for turn, (chunk, home, blank) in enumerate(away):
                while begun < min(turns, given + len(self._slots)):
                    self.begin(away[begun].home, load=not away[begun].blank)
                    begun += 1
                visits = near[turn * len(near) // turns : (turn + 1) * len(near) // turns]
                visit = Visit(chunk, self.take(home), blank)
                taken += 1
                use([*visits, visit])
                self.give(home)
                given += 1
        except OSError:
            raise
        except BaseException:
            for _, home, _ in away[given:taken]:
                self.give(home)
            for _, home, _ in away[taken:begun]:  # nothing stays on its way
                self.take(home)
                self.give(home)
            raise

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
