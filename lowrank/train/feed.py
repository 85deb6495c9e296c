"""The batches that the loop asks for: those of the next step, and all of the held-out data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowrank.data import Batch, Sampler, TokenizedExamples, collate
from lowrank.data.sampler import Rows
from lowrank.progress import bar
from lowrank.train.config import TrainConfig
from lowrank.train.distributed import Ranks


@dataclass(frozen=True)
class Counts:
    """How many examples a step takes, and how many tokens of them, some to be learned."""

    examples: int
    tokens: int
    labelled: int


class Feed:
    """Lays what `sampler` chooses of `data` into batches on the device.

    end_to_end: the examples of a batch one behind the other, not in padded rows. Of `ranks` that
    share the work, `rank` takes every so-many-th row of a step, and of the data in their order.
    Those `in_step` compute as many batches as one another, as each has a part of the weights: one
    with fewer of its own computes another's too, for nothing. If `quiet`, no bar is drawn.
    """

    def __init__(
        self,
        data: TokenizedExamples,
        sampler: Sampler,
        device: torch.device,
        end_to_end: bool,
        pad_token_id: int,
        rank: int = 0,
        ranks: int = 1,
        in_step: bool = False,
        quiet: bool = False,
    ) -> None:
        self.data, self.sampler, self.device = data, sampler, device
        self.end_to_end, self.pad_token_id = end_to_end, pad_token_id
        self.rank, self.ranks, self.in_step = rank, ranks, in_step
        self._quiet = quiet

    def of_step(self, consumed: int, batch_size: int | None = None) -> list[Batch]:
        """The batches of the step that comes after `consumed` examples.

        With `batch_size`, the same rows in batches of so many, which changes memory alone.
        """
        size = batch_size or self.sampler.batch_size
        rows = self._rows(consumed)[self.rank :: self.ranks]
        return [self._batch(rows[i : i + size]) for i in range(0, len(rows), size)]

    def idle_of_step(self, consumed: int, batch_size: int | None = None) -> list[Batch]:
        """What is computed beside them while others compute theirs."""
        size = batch_size or self.sampler.batch_size
        rows = self._rows(consumed)
        return self._idle(rows[:1], len(rows), size)

    def idle_in_order(self, batch_size: int) -> list[Batch]:
        """The same of `in_order`."""
        return self._idle([[0]], len(self.data), batch_size)

    def counts(self, consumed: int) -> Counts:
        """Of the same step, on all ranks."""
        numbers = [i for row in self._rows(consumed) for i in row]
        data = self.data
        return Counts(
            len(numbers), sum(map(data.length, numbers)), sum(data.labelled[i] for i in numbers)
        )

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, as they lie; a bar shows how many are done, if that takes long."""
        numbers = range(self.rank, len(self.data), self.ranks)
        starts = range(0, len(numbers), batch_size)
        for start in bar("evaluating", starts, len(starts), self._quiet):
            yield self._batch([[i] for i in numbers[start : start + batch_size]])

    def _idle(self, rows: Rows, total: int, size: int) -> list[Batch]:
        own = len(range(self.rank, total, self.ranks))
        most = len(range(0, total, self.ranks))
        missing = -(-most // size) - -(-own // size) if self.in_step else 0
        return [self._batch(rows) for _ in range(missing)]

    def _rows(self, consumed: int) -> Rows:
        return [row for part in self.sampler.step(consumed) for row in part]

    def _batch(self, rows: Rows) -> Batch:
        return collate(self.data, rows, self.end_to_end, self.pad_token_id).to(self.device)

    def where(self, batches: list[Batch], most: int = 6) -> str:
        """Where the examples of these batches came from; the first `most` of them."""
        numbers = [i for batch in batches for i in batch.numbers]
        named = ", ".join(self.data.where(i) for i in numbers[:most])
        return named if len(numbers) <= most else f"{named} and {len(numbers) - most} more"


def feed_of(
    config: TrainConfig,
    device: torch.device,
    ranks: Ranks,
    end_to_end: bool,
    pad_token_id: int,
    data: TokenizedExamples,
    batch_size: int,
) -> Feed:
    """What a run of these settings, which the `ranks` share, is fed of `data`."""
    sampler = Sampler(
        data.lengths,
        batch_size,
        config.gradient_accumulation_steps * ranks.size,
        config.seed if config.data_seed is None else config.data_seed,
        pack_to=config.max_length if config.packing else None,
        group_by_length=config.group_by_length,
    )
    share = (ranks.rank, ranks.size, config.parallel == "fsdp")
    quiet = config.disable_tqdm or not ranks.first
    return Feed(data, sampler, device, end_to_end, pad_token_id, *share, quiet)
