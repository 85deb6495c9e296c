"""A value computed from tensors, kept for as long as they stay as they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Kept:
    """Computed again when one of the tensors it was computed from is another, or was written to.

    While compiling, tensors are not looked at: whoever changes them by other ways than an operator
    calls `forget`. A copy of it, pickled or not, is empty.
    """

    def __init__(self) -> None:
        self._sources: list[weakref.ref] = []
        self._states: list[tuple[int, int]] = []
        self._value: Tensor | None = None

    def forget(self) -> None:
        """Compute it anew the next time."""
        self._value = None

    def get(self, sources: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` returns, or returned when the sources were as they are."""
        if torch.compiler.is_compiling():
            if self._value is None:
                self._value = compute()
                self._sources = self._states = []
            return self._value
        states = [_state(tensor) for tensor in sources]
        if (
            self._value is None
            or states != self._states
            or any(ref() is not tensor for ref, tensor in zip(self._sources, sources, strict=True))
        ):
            self._value, self._states = compute(), states
            self._sources = [weakref.ref(tensor) for tensor in sources]
        return self._value

    def __reduce__(self) -> tuple:
        return Kept, ()


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
