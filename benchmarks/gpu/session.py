"""A run on a device: what was asked for, and the rows that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks import peers, table
from benchmarks.gpu import timing
from benchmarks.harness import Contender, nbytes
from benchmarks.settings import add_rates, rows_of

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # of a product's error

Weight = tuple[Tensor, Tensor, Tensor, Tensor]  # packed, absmax, absmax_scale, codebook


@dataclass
class Session:
    """Choices of the command line, the measured ceilings, and the rows so far.

    `shapes` are (label, N, K); `against` names the peers that are here; `dtype` is that of x and
    of what is dense.
    """

    device: torch.device
    dtype: torch.dtype
    shapes: Sequence[tuple[str, int, int]]
    rows_of_x: Sequence[int]
    seconds: float
    against: Sequence[str]
    ceilings: dict[str, float]
    rows: list[dict] = field(default_factory=list)

    @property
    def limit(self) -> float:
        """The largest relative error of a product in the run's dtype."""
        return LIMITS[self.dtype]

    def compare(
        self, benchmark: str, case: str, contenders: Sequence[Contender], memory: str
    ) -> None:
        """Time the contenders of a case in turn, keep their rows, print them.

        Speeds are relative to the first contender; `memory` names the ceiling of the memory
        traffic, "copy" or "read".
        """
        dtype = str(self.dtype).removeprefix("torch.")
        contenders = [replace(contender, dtype=dtype) for contender in contenders]
        summaries = timing.measure(contenders, self.seconds, self.device)
        rows = rows_of(benchmark, case, contenders, summaries, contenders[0].name, memory)
        add_rates(rows, self.ceilings)
        self.rows += rows
        print("\n" + table.titled(rows), flush=True)

    def copies(self, size: int) -> int:
        """How many copies of inputs of `size` bytes are past the cache."""
        return timing.copies_past_cache(size, self.device)

    def quantized(self, dense: Tensor) -> tuple[list[Weight], Tensor]:
        """Copies past the cache of `dense` [N, K] in NF4 with double quantization, and what they
        stand for, [N, K] float64.
        """
        storage = peers.lowrank_quantizer().quantize(dense)
        weight = peers.operands(storage)
        count = self.copies(nbytes(weight))
        copies = [tuple(t.clone() for t in weight) for _ in range(count)]
        return copies, peers.exact_lowrank(storage)
