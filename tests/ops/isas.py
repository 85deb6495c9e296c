"""The instruction sets of the CPU kernels, as parameters of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lowrank import ops
from lowrank.ops import native

_ABSENT = native.load_cpu() if isinstance(native.load_cpu(), str) else None
_USABLE = () if _ABSENT else native.usable_isas()

needs_library = pytest.mark.skipif(_ABSENT is not None, reason=_ABSENT or "")

ISAS = [
    pytest.param(
        name,
        marks=[
            needs_library,
            pytest.mark.skipif(
                not _ABSENT and name not in _USABLE, reason=f"needs a CPU with {name}"
            ),
        ],
    )
    for name in native.ISAS
]


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """So many for torch's operators and ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def running_on(isa: str) -> Iterator[None]:
    """Every operator runs on the CPU kernels of `isa`, or raises: never on the reference."""
    before = native.isa()
    native.use_isa(isa)
    try:
        with ops.use_backend("cpu"):
            yield
    finally:
        native.use_isa(before)
