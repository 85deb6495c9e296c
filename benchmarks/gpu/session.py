"""A run on a CUDA device: the settings of any run, timed by events, copies past the L2 cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import machine, peers
from benchmarks.gpu import timing
from benchmarks.harness import Contender, copies_for, nbytes
from benchmarks.settings import Settings

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # of a product's error

Weight = tuple[Tensor, Tensor, Tensor, Tensor]  # packed, absmax, absmax_scale, codebook


@dataclass
class Session(Settings):
    """`dtypes` has one entry; on a CPU everything runs too, by the clock, as the tests do."""

    @property
    def dtype(self) -> torch.dtype:
        """That of x and of what is dense."""
        return next(iter(self.dtypes.values()))

    @property
    def limit(self) -> float:
        """The largest relative error of a product in the run's dtype."""
        return LIMITS[self.dtype]

    def free_bytes(self) -> int:
        if self.device.type != "cuda":
            return machine.memory("MemAvailable")
        return torch.cuda.mem_get_info(self.device)[0]

    def measure(self, contenders: Sequence[Contender]) -> list[dict]:
        return timing.measure(contenders, self.seconds, self.device)

    def copies(self, size: int) -> int:
        """How many copies of inputs of `size` bytes are past the cache."""
        return copies_for(size, self.working_set)

    def quantized(self, dense: Tensor) -> tuple[list[Weight], Tensor]:
        """Copies past the cache of `dense` [N, K] in NF4 with double quantization, and what they
        stand for, [N, K] float64.
        """
        storage = peers.lowrank_quantizer().quantize(dense)
        weight = peers.operands(storage)
        count = self.copies(nbytes(weight))
        copies = [tuple(t.clone() for t in weight) for _ in range(count)]
        return copies, peers.exact_lowrank(storage)
