"""An operator's gradient, registered with torch's dispatcher.

`torch.library.register_autograd` does the same, but asks the schema in every call for the default
of every argument: 80 us with lora_linear's fifteen, of the 400 us that a layer's forward spends in
Python. Our operators have no defaults, and no arguments by name alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

_applied: dict[str, Callable] = {}


def recorded(name: str) -> Callable:
    """(*args, compute) -> compute(*args), with the gradients of the operator of that name."""
    return _applied[name]


def register(
    library: torch.library.Library, name: str, setup: Callable, backward: Callable
) -> None:
    """Let autograd call `setup(ctx, inputs, output)`, and `backward(ctx, *grads)` for gradients."""
    op = getattr(torch.ops.lowrank, name).default

    def below(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            *inputs, compute = args
            output = compute(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            gradients = backward(ctx, *grads)
            return (*gradients, None)  # of `compute`

    Backward.__name__ = Backward.__qualname__ = f"{name}_backward"
    _applied[name] = Backward.apply

    def run(keyset, *args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Backward.apply(*args, partial(below, keyset))
        return below(keyset, *args)

    library.impl(name, run, "Autograd", with_keyset=True)
