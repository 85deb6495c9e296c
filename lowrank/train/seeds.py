"""Where a run's random numbers come from, and algorithms that give the same sums every time."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Iterator

import torch


def set_seed(seed: int) -> None:
    """Seed torch on every device, `random`, and numpy where it is used."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Only deterministic algorithms while inside; torch raises an error where there is none."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    # cuBLAS reads it when the first product on a GPU is formed
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
