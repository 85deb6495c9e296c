"""Activations kept in host memory from the forward to the backward.

With checkpointing these are the inputs of the blocks: they leave the device while the forward goes
on, and each comes back while the backward computes the block behind it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lowrank.data import Batch
from lowrank.errors import ConfigError
from lowrank.train.loss import BatchLoss

LEAST = 1 << 16  # bytes; what is smaller is not worth a transfer


def offloaded(loss: BatchLoss, model: nn.Module, device: torch.device) -> BatchLoss:
    """The same loss, whose activations wait for the backward in host memory.

    ConfigError where they are there anyway.
    """
    if device.type != "cuda":
        raise ConfigError(
            "activation_offloading moves activations from a GPU to host memory; the model is on "
            f"{device}, so there is nothing to move: turn it off"
        )
    offload = Offload(device, [*model.parameters(), *model.buffers()])

    def offloaded_loss(batch: Batch) -> Tensor:
        with offload:
            return loss(batch)

    return offloaded_loss


class Offload:
    """Inside, what autograd keeps of tensors on `device`, but for `parameters`, goes to the host.

    The very same bits come back. On a CUDA device a second stream copies, to and from pinned
    memory. At most two tensors are on their way out: the device holds no more than these.
    """

    def __init__(
        self, device: torch.device, parameters: Iterable[Tensor], least: int = LEAST
    ) -> None:
        self.device, self.least = device, least
        self._own = {p.untyped_storage().data_ptr() for p in parameters}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: list[_Away] = []

    def __enter__(self) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()

    def __exit__(self, *exc_info) -> None:
        self._hooks.__exit__(*exc_info)
        self._wait_for(0)

    def _pack(self, kept: Tensor) -> Tensor | _Away:
        own = kept.untyped_storage().data_ptr() in self._own
        if own or kept.device != self.device or kept.nbytes < self.least:
            return kept
        for away in self._leaving:  # several layers keep the same input
            if away.is_of(kept):
                return away
        self._wait_for(1)
        self._leaving.append(_Away(kept, self._stream, self._leaving[-1:]))
        return self._leaving[-1]

    def _wait_for(self, left: int) -> None:
        """Let go of all but the last `left` of those that leave."""
        while len(self._leaving) > left:
            self._leaving.pop(0).let_go()


def _unpack(kept: Tensor | _Away) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    here = kept.fetched()
    for away in kept.before:
        away.fetch()
    return here


class _Away:
    """A tensor on its way to the host and back, and what left just `before` it, if anything."""

    def __init__(self, kept: Tensor, stream: torch.cuda.Stream | None, before: list[_Away]) -> None:
        self.before, self._stream, self._device = before, stream, kept.device
        self._kept: Tensor | None = kept  # till it is copied its memory is not another's
        self._here: Tensor | None = None
        pinned = stream is not None
        self._host = torch.empty(kept.shape, dtype=kept.dtype, device="cpu", pin_memory=pinned)
        self._copy(kept, self._host)

    def is_of(self, kept: Tensor) -> bool:
        """Whether it is this tensor, as it is now."""
        mine = self._kept
        return mine is not None and (
            (mine.data_ptr(), mine.shape, mine.stride(), mine.dtype, mine._version)
            == (kept.data_ptr(), kept.shape, kept.stride(), kept.dtype, kept._version)
        )

    def let_go(self) -> None:
        """Free its place on the device for what is computed there from now on."""
        self._wait()
        self._kept = None

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self._here is None:
            self._here = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
            self._copy(self._host, self._here)

    def fetched(self) -> Tensor:
        """The tensor, on its device again."""
        self.fetch()
        self._wait()
        here, self._here = self._here, None
        assert here is not None
        return here

    def _copy(self, from_: Tensor, to: Tensor) -> None:
        """After all that the device has been asked for so far; the device goes on meanwhile."""
        self._copied: torch.cuda.Event | None = None
        if self._stream is None:
            to.copy_(from_)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(from_, non_blocking=True)
        self._copied = self._stream.record_event()

    def _wait(self) -> None:
        """Let what the device computes next come after the copy."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
