"""Blocks whose frozen weights lie in host memory, and come to the device when they compute.

A budget of bytes says how much of the model lies on the device for good. What does not fit waits in
host memory, pinned for a GPU; while one such block computes, the next one comes. In a backward they
come in the other order. Two of them are on the device at most: the rest of the time the memory that
autograd has noted is there without bytes, so that a graph keeps no weight alive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank.errors import ConfigError, TrainingError
from lowrank.optim.streams import streams_of


class Placement:
    """Where the blocks of a decoder are. `away` are the numbers of those that come and go.

    `peak_bytes`: the most that the blocks that come and go have taken of the device so far.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], away: Sequence[int], device: torch.device
    ) -> None:
        self.device, self.away = device, tuple(away)
        self._streams = streams_of(device)
        self._visitors = {i: [_Visitor(p, device) for p in _frozen(blocks[i])] for i in away}
        self._here: dict[int, Any] = {}  # block -> the event after which it is on the device
        self.peak_bytes = 0

    def enter(self, i: int) -> None:
        """Before block `i` computes: it is on the device, and the next one is on its way."""
        if i in self._visitors:
            self._come(i, self._after(i))

    def leave(self, i: int, y: Tensor) -> Tensor:
        """What block `i` gives, y, whose gradient brings the block back."""
        if i not in self._visitors or not y.requires_grad:
            return y
        return _Leave.apply(y, self, i)

    def come_back(self, i: int) -> None:
        """Before the backward of block `i`."""
        at = self.away.index(i)
        self._come(i, self.away[at - 1] if at else None)

    def _after(self, i: int) -> int | None:
        """The next to compute: after the last one it is the first, but for a backward."""
        at = self.away.index(i) + 1
        if at < len(self.away):
            return self.away[at]
        return None if torch.is_grad_enabled() else self.away[0]

    def _come(self, i: int, following: int | None) -> None:
        for other in [j for j in self._here if j not in (i, following)]:
            self._wait(other)  # its memory is written to no more
            for visitor in self._visitors[other]:
                visitor.go()
            del self._here[other]
        for j in (i, following):
            if j is not None and j not in self._here:
                self._here[j] = self._fetch(j)
        self._wait(i)
        for visitor in self._visitors[i]:
            visitor.arrive()
        taken = sum(visitor.n_bytes for j in self._here for visitor in self._visitors[j])
        self.peak_bytes = max(self.peak_bytes, taken)

    def _wait(self, i: int) -> None:
        if self._here[i] is not None:
            self._streams.wait(self._here[i])
            self._here[i] = None

    def _fetch(self, i: int) -> Any:
        visitors = self._visitors[i]
        for visitor in visitors:
            visitor.make_room()
        # what was in that memory may still be read by what the device was asked for so far
        asked = None if self._streams is None else self._streams.mark()
        return [visitor.come(self._streams, asked) for visitor in visitors][-1]


class _Visitor:
    """A frozen parameter whose values are in host memory, and on the device for a while."""

    def __init__(self, parameter: nn.Parameter, device: torch.device) -> None:
        host = parameter.detach().to("cpu")
        if device.type == "cuda":
            host = host.pin_memory()
        # what is put beside it, an adapter, belongs where it computes
        parameter.computes_on = device
        parameter.data, self._parameter = host, parameter
        self._host, self._guest = host, torch.empty_like(host, device=device)
        self.n_bytes = self._guest.untyped_storage().nbytes()
        self._guest.untyped_storage().resize_(0)

    def make_room(self) -> None:
        if self._parameter.requires_grad:
            raise TrainingError(
                "weights_budget: weights that train have to stay on the device; inject an adapter "
                "and train that, or load the model without weights_budget"
            )
        self._host = self._parameter.data
        self._guest.untyped_storage().resize_(self.n_bytes)

    def come(self, streams: Any, asked: Any) -> Any:
        # not to the parameter itself: its version, by which autograd tells a change, stays
        if streams is None:
            self._guest.copy_(self._host)
            return None
        return streams.load(self._guest, self._host, asked)

    def arrive(self) -> None:
        self._parameter.data = self._guest

    def go(self) -> None:
        self._parameter.data = self._host
        self._guest.untyped_storage().resize_(0)


class _Leave(torch.autograd.Function):
    """y; whose gradient is the sign that the block which gave it is about to be needed."""

    @staticmethod
    def forward(ctx, y: Tensor, placement: Placement, i: int) -> Tensor:
        ctx.placement, ctx.i = placement, i
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        ctx.placement.come_back(ctx.i)
        return dy, None, None


def place(
    model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, budget: int
) -> Placement | None:
    """Put a model on the device as far as `budget` bytes go; None if it fits whole.

    All but the blocks, and two of them on their way, have to. Those that come and go are spread
    among the others, which compute meanwhile.
    """
    sizes = [_n_bytes(block) for block in blocks]
    rest = _n_bytes(model) - sum(sizes)
    away = _away(sizes, rest, budget)
    there = {id(p) for i in away for p in _frozen(blocks[i])}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in there:
            tensor.data = tensor.data.to(device)
    return Placement(blocks, away, device) if away else None


def _away(sizes: Sequence[int], rest: int, budget: int) -> list[int]:
    """The fewest blocks, evenly among all, without which the rest is within the budget."""
    for count in range(len(sizes) + 1):
        away = [(2 * k + 1) * len(sizes) // (2 * count) for k in range(count)]
        visiting = sorted((sizes[i] for i in away), reverse=True)[:2]
        need = rest + sum(sizes) - sum(sizes[i] for i in away) + sum(visiting)
        if need <= budget:
            return away
    raise ConfigError(
        f"weights_budget: expected at least {need} bytes, for all but the blocks and two of these; "
        f"got {budget}; quantize the embedding too with embeddings=True, or take another quantizer"
    )


def _frozen(block: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a block, frozen now."""
    for parameter in block.parameters():
        yield parameter.requires_grad_(False) if parameter.requires_grad else parameter


def _n_bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
