"""The batches that the loop asks for: those of the next step, and all of the held-out data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lowrank.data import Batch, TokenizedExamples, collate, step_batches, steps_per_epoch


class Feed:
    """Lays examples into batches on the device.

    batch_size: examples in one batch. accumulation: batches of one step. packed: end to end, not
    in padded rows.
    """

    def __init__(
        self,
        data: TokenizedExamples,
        device: torch.device,
        batch_size: int,
        accumulation: int,
        seed: int,
        packed: bool,
        pad_token_id: int,
    ) -> None:
        self.data, self.device = data, device
        self.batch_size, self.accumulation, self.seed = batch_size, accumulation, seed
        self.packed, self.pad_token_id = packed, pad_token_id

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.data), self.batch_size * self.accumulation)

    def of_step(self, consumed: int) -> list[Batch]:
        """The batches of the step that comes after `consumed` examples."""
        parts = step_batches(
            len(self.data), self.batch_size, self.accumulation, self.seed, consumed
        )
        return [self._batch(part) for part in parts]

    def in_order(self) -> Iterator[Batch]:
        """Every example once, as they lie."""
        for start in range(0, len(self.data), self.batch_size):
            yield self._batch(range(start, min(start + self.batch_size, len(self.data))))

    def _batch(self, indices: Sequence[int]) -> Batch:
        return collate(self.data, indices, self.packed, self.pad_token_id).to(self.device)
