"""Activations computed again in the backward: all of a part of a block but its last projection.

The gradient of a projection needs its input, never its output, so there is nothing to gain from
multiplying by its weight again: what is computed again ends in front of it, and it gets its input
from there.   Chen et al., arXiv:1604.06174, §3.

`torch.utils.checkpoint` does the same for any function, and asks about every tensor that is kept in
either pass: 2,200 of them in a step of 30 blocks, a tenth of its time where batches are small.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank.nn.autocast import is_autocast_on, no_autocast

Part = Callable[[Tensor], tuple[Tensor, ...]]


def recompute(
    part: Part, within: Sequence[nn.Module], last: Sequence[Callable[[Tensor], Tensor]], x: Tensor
) -> list[Tensor]:
    """[..., last[0](y), last[1](z)] for part(x) = (..., y, z), of which only x is kept.

    And what each of `last`, which may be none, adds to what it is given. `within` are the modules
    whose parameters `part` has. All run as they are; gradients are the same to the last bit.
    """
    tensors = (p for module in within for m in module.modules() for p in m._parameters.values())
    trained = [p for p in tensors if p is not None and p.requires_grad]
    outputs = list(_Again.apply(part, x, *trained))
    first = len(outputs) - len(last)
    node = next((z.grad_fn for z in outputs[first:] if z.grad_fn is not None), None)
    if node is None:
        return outputs[:first] + [f(z) for f, z in zip(last, outputs[first:], strict=True)]
    places = {(z.data_ptr(), z.nbytes): i for i, z in enumerate(outputs[first:], first)}

    def pack(kept: Tensor) -> Tensor | tuple[int, torch.Size, tuple[int, ...]]:
        place = places.get((kept.data_ptr(), kept.nbytes))
        return kept if place is None else (place, kept.shape, kept.stride())

    def unpack(kept: Tensor | tuple[int, torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        place, *layout = kept
        again = _outputs(node)[place].detach()
        return again.as_strided(*layout, again.storage_offset())

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return outputs[:first] + [f(z) for f, z in zip(last, outputs[first:], strict=True)]


class _Again(torch.autograd.Function):
    """part(x), which is computed once more for its gradients in x and in what it trains."""

    @staticmethod
    def forward(ctx, part: Part, x: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *trained)
        ctx.part, ctx.state, ctx.outputs = part, _State(x), None
        with ctx.state.autocast():
            return part(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        outputs, inputs = _outputs(ctx), ctx.inputs
        ctx.outputs = ctx.inputs = None
        pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
        if not pairs:  # `within` trains something, but not in `part`
            return None, *(None for _ in inputs)
        wanted = [t for t in inputs if t.requires_grad]
        outputs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return None, *(next(found) if t.requires_grad else None for t in inputs)


def _outputs(ctx) -> tuple[Tensor, ...]:
    """What `part` gives, with its graph: computed for the first who asks, until the backward."""
    if ctx.outputs is None:
        x, *trained = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[1])
        with ctx.state.again(), torch.enable_grad():
            ctx.outputs, ctx.inputs = ctx.part(x), [x, *trained]
    return ctx.outputs


class _State:
    """What a forward depends on beside its input: random numbers, and autocast."""

    def __init__(self, x: Tensor) -> None:
        self._device = x.device
        self._random = self._random_states()
        kind = x.device.type
        self._dtype = torch.get_autocast_dtype(kind) if is_autocast_on(kind) else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast as it was; but a cast without its graph is not kept for one that needs it."""
        if self._dtype is None:
            return no_autocast(self._device)
        return torch.autocast(self._device.type, self._dtype, cache_enabled=False)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, it is as it was; then random numbers go on from where they were."""
        now = self._random_states()
        self._set_random(self._random)
        try:
            with self.autocast():
                yield
        finally:
            self._set_random(now)

    def _random_states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type not in ("cpu", "meta"):
            states.append(torch.get_device_module(self._device).get_rng_state(self._device))
        return states

    def _set_random(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.get_device_module(self._device).set_rng_state(state, self._device)
