"""The batches that the loop asks for: those of the next step, and all of the held-out data."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lowrank.data import Batch, Sampler, TokenizedExamples, collate
from lowrank.data.sampler import Rows


class Feed:
    """Lays what `sampler` chooses of `data` into batches on the device.

    end_to_end: the examples of a batch one behind the other, not in padded rows.
    """

    def __init__(
        self,
        data: TokenizedExamples,
        sampler: Sampler,
        device: torch.device,
        end_to_end: bool,
        pad_token_id: int,
    ) -> None:
        self.data, self.sampler, self.device = data, sampler, device
        self.end_to_end, self.pad_token_id = end_to_end, pad_token_id

    def of_step(self, consumed: int, batch_size: int | None = None) -> list[Batch]:
        """The batches of the step that comes after `consumed` examples.

        With `batch_size`, the same rows in batches of so many, which changes memory alone.
        """
        parts = self.sampler.step(consumed)
        if batch_size is not None:
            rows = [row for part in parts for row in part]
            parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        return [self._batch(rows) for rows in parts]

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, as they lie."""
        for start in range(0, len(self.data), batch_size):
            stop = min(start + batch_size, len(self.data))
            yield self._batch([[i] for i in range(start, stop)])

    def _batch(self, rows: Rows) -> Batch:
        return collate(self.data, rows, self.end_to_end, self.pad_token_id).to(self.device)

    def where(self, batches: list[Batch], most: int = 6) -> str:
        """Where the examples of these batches came from; the first `most` of them."""
        numbers = [i for batch in batches for i in batch.numbers]
        named = ", ".join(self.data.where(i) for i in numbers[:most])
        return named if len(numbers) <= most else f"{named} and {len(numbers) - most} more"
