"""Copies between a GPU and its host beside what the GPU computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Streams:
    """A stream for each direction, and the events that keep them and the caller's in order.

    Every copy waits for the events it is given and returns one of its own; nothing here waits on
    the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._inward = torch.cuda.Stream(device)
        self._outward = torch.cuda.Stream(device)

    def mark(self) -> Any:
        """An event after all that the caller has asked of the device so far."""
        return self._event(torch.cuda.current_stream(self.device))

    def wait(self, event: Any) -> None:
        """What the caller asks of the device from now on waits for the event."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def load(self, target: Tensor, source: Tensor, *after: Any) -> Any:
        """Copy from the host."""
        return self._copy(self._inward, target, source, after)

    def save(self, target: Tensor, source: Tensor, *after: Any) -> Any:
        """Copy to the host."""
        return self._copy(self._outward, target, source, after)

    def _copy(self, stream: Any, target: Tensor, source: Tensor, after: tuple[Any, ...]) -> Any:
        for event in after:
            if event is not None:
                stream.wait_event(event)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return self._event(stream)

    def _event(self, stream: Any) -> Any:
        event = torch.cuda.Event()
        event.record(stream)
        return event


def streams_of(device: torch.device) -> Streams | None:
    """None where there are none: on a CPU."""
    return Streams(device) if device.type == "cuda" else None
