"""A GPU that is none: streams and events that keep no time, only who must come before whom.

Every stream, thread and the caller is an actor with a vector clock; every access to memory is an
operation of one of them. Two that touch the same bytes, one of them writing, are a race unless one
happened before the other by the waits that were asked for, whatever the order they ran in here.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(eq=False)
class Actor:
    name: str
    clock: dict[Actor, int] = field(default_factory=dict)

    def tick(self) -> int:
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def join(self, clock: dict[Actor, int]) -> None:
        for actor, time in clock.items():
            self.clock[actor] = max(self.clock.get(actor, 0), time)

    # what the library asks of a stream

    def wait_event(self, event: Event) -> None:
        self.join(event.clock)


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.clock = machine, {}

    def record(self, stream: Actor) -> None:
        self.machine.enqueue(stream)
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        self.machine.thread.join(self.clock)


class Future:
    """Of a job that ran when it was submitted, by a thread of its own time."""

    def __init__(self, machine: Machine, actor: Actor, job, args) -> None:
        self.machine, self.error = machine, None
        actor.join(machine.thread.clock)
        before, machine.thread = machine.thread, actor
        was_host, machine.on_host = machine.on_host, True
        try:
            job(*args)
        except Exception as error:
            self.error = error
        finally:
            machine.thread, machine.on_host = before, was_host
        actor.tick()
        self.clock = dict(actor.clock)

    def result(self) -> None:
        self.machine.thread.join(self.clock)
        if self.error is not None:
            raise self.error


class Executor:
    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.actor = machine, Actor(name)

    def submit(self, job, *args) -> Future:
        return Future(self.machine, self.actor, job, args)


class Machine(TorchDispatchMode):
    """While it is entered, operations of torch are recorded; `races` are those it found."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = Actor("caller")
        self.default = self.stream = Actor("default stream")
        self.on_host = False
        self.accesses: list[tuple[int, int, bool, Actor, int, str]] = []
        self.races: list[str] = []
        self.seen: set[str] = set()
        self.made = 0

    def install(self, monkeypatch) -> None:
        """Let the library find it where it looks for a GPU."""
        from lowrank.optim import pages, rings, streams, tiers

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.new_stream())
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "stream", self.in_stream)
        monkeypatch.setattr(pages, "streams_of", streams.Streams)
        monkeypatch.setattr(rings, "ThreadPoolExecutor", lambda _, name: Executor(self, name))
        monkeypatch.setattr(tiers, "pinned", lambda n: torch.empty(n, dtype=torch.uint8))

    def new_stream(self) -> Actor:
        self.made += 1
        return Actor(f"stream {self.made}")

    @contextmanager
    def in_stream(self, stream: Actor):
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def enqueue(self, stream: Actor) -> None:
        """What a thread asks of a stream comes after what the thread knows of."""
        self.thread.tick()
        stream.join(self.thread.clock)
        stream.tick()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.record(func, args)
        return result

    def record(self, func, args) -> None:
        actor = self.thread if self.on_host else self.stream
        if self.on_host:
            actor.tick()
        else:
            self.enqueue(actor)
        for i, value in enumerate(args):
            # operators of steps write all but gradients, which nobody else reads meanwhile
            writes = (func.name(), i) != ("aten::copy_", 1)
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.numel() and tensor.dtype in (
                    torch.uint8, torch.float32
                ):  # fmt: skip
                    self.touch(tensor, writes, actor, func.name())
        self.seen.add(actor.name)
        if func.name() == "aten::copy_" and not any(args[2:]):
            self.thread.join(actor.clock)  # such a copy is waited for

    def touch(self, tensor: torch.Tensor, writes: bool, actor: Actor, name: str) -> None:
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        for first, last, wrote, other, time, other_name in self.accesses:
            both = first < end and start < last and (writes or wrote)
            if both and actor.clock.get(other, 0) < time:
                self.races.append(f"{other_name} of {other.name}, {name} of {actor.name}")
        if len(self.accesses) > 20_000:
            raise AssertionError("too many accesses to compare")
        self.accesses.append((start, end, writes, actor, actor.clock[actor], name))
