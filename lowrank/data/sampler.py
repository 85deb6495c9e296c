"""Which examples a step takes: a function of the seed and of how many examples came before."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch

from lowrank.data.packing import best_fit_decreasing
from lowrank.errors import DataError

Rows = list[list[int]]  # the rows of a micro-batch: one example each, or those of one pack

_POOL = 50  # steps whose examples are sorted together by length, as transformers does


class Sampler:
    """The micro-batches of every step of a run, with nothing to store but a number.

    Each epoch takes each of the examples, whose `lengths` in tokens are given, once, in an order
    that (seed, epoch) decide. A step takes batch_size * accumulation examples, fewer at the end of
    an epoch, never of two. With `pack_to`, it takes that many packs of at most so many tokens. With
    `group_by_length`, examples of similar length, the longest of all in the first step, so that
    memory that does not suffice shows at once. How a step is split into micro-batches changes
    neither its examples nor their order.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        accumulation: int,
        seed: int,
        *,
        pack_to: int | None = None,
        group_by_length: bool = False,
    ) -> None:
        self.lengths, self.batch_size, self.accumulation = lengths, batch_size, accumulation
        self.seed, self.pack_to, self.group_by_length = seed, pack_to, group_by_length
        self._epoch, self._order = -1, []
        self._starts: Sequence[int] = ()

    @property
    def rows_per_epoch(self) -> int:
        """Packs, or examples, that an epoch has."""
        self._prepare(max(self._epoch, 0))  # every epoch has as many
        return len(self._starts) - 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that take every example once; the last may be short."""
        return -(-self.rows_per_epoch // (self.batch_size * self.accumulation))

    def step(self, consumed: int) -> list[Rows]:
        """The micro-batches of the step that comes after `consumed` examples, over all epochs.

        DataError if no row begins there: the data or the settings are not those of that run.
        """
        epoch, within = divmod(consumed, len(self.lengths))
        self._prepare(epoch)
        first = bisect_left(self._starts, within)
        if self._starts[first] != within:
            raise DataError(
                f"no pack begins after {within} of {len(self.lengths)} examples: expected to go on "
                "with the data and max_length that the run began with"
            )
        bounds = self._starts[first : first + self.batch_size * self.accumulation + 1]
        rows = [self._order[start:end] for start, end in pairwise(bounds)]
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def _prepare(self, epoch: int) -> None:
        """Work out the order of an epoch; row r is _order[_starts[r] : _starts[r + 1]]."""
        if epoch == self._epoch:
            return
        self._order = epoch_order(len(self.lengths), self.seed, epoch)
        self._starts = range(len(self._order) + 1)
        if self.pack_to is not None:
            packs = best_fit_decreasing(self.lengths, self._order, self.pack_to)
            packs = [packs[i] for i in epoch_order(len(packs), self.seed, epoch)]
            self._order = [i for pack in packs for i in pack]
            self._starts = list(accumulate(map(len, packs), initial=0))
        elif self.group_by_length:
            self._order = self._grouped(self._order, epoch)
        self._epoch = epoch

    def _grouped(self, order: Sequence[int], epoch: int) -> list[int]:
        """`order` with the examples of each step close in length; a short step stays the last."""
        size = self.batch_size * self.accumulation
        steps: Rows = []
        for start in range(0, len(order), _POOL * size):
            pool = sorted(order[start : start + _POOL * size], key=lambda i: -self.lengths[i])
            steps += [pool[i : i + size] for i in range(0, len(pool), size)]
        short = [steps.pop()] if len(steps[-1]) < size else []
        steps = [steps[i] for i in epoch_order(len(steps), self.seed, epoch)]
        if steps:
            longest = max(range(len(steps)), key=lambda s: self.lengths[steps[s][0]])
            steps.insert(0, steps.pop(longest))
        return [i for step in [*steps, *short] for i in step]


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of `count` things in an epoch: a permutation that (seed, epoch) alone decide."""
    mixed = (seed * 0x9E3779B97F4A7C15 + epoch) % 2**63  # neighbouring seeds and epochs do not meet
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed)).tolist()
