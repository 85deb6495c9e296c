"""Which examples a step takes, a function of (seed, samples consumed); how they lie in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lowrank.data.sampler import epoch_order
from lowrank.data.tokens import IGNORED, TokenizedExamples


@dataclass(frozen=True)
class Batch:
    """Token ids for one forward.

    Packed: input_ids, labels, position_ids [1, T], examples end to end, positions restarting at 0.
    Padded: input_ids, labels, attention_mask [B, S], padded on the right with labels of -100.
    The first label of each example is -100. `tokens` counts the real tokens of its `examples`,
    `labelled` those that are learned.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    examples: int
    tokens: int
    labelled: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; itself if it is there."""
        if self.input_ids.device == device:
            return self
        names = ("input_ids", "labels", "position_ids", "attention_mask")
        there = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(
            self, **{name: tensor.to(device, non_blocking=True) for name, tensor in there.items()}
        )


def steps_per_epoch(count: int, samples_per_step: int) -> int:
    """Optimizer steps that take every example once; the last step may be short."""
    return -(-count // samples_per_step)


def step_batches(
    count: int, batch_size: int, accumulation: int, seed: int, consumed: int
) -> list[list[int]]:
    """The micro-batches (lists of example numbers) of the step that comes after `consumed` samples.

    A step takes batch_size * accumulation samples, fewer at the end of an epoch, never of two.
    """
    epoch, start = divmod(consumed, count)
    taken = epoch_order(count, seed, epoch)[start : start + batch_size * accumulation]
    return [taken[i : i + batch_size] for i in range(0, len(taken), batch_size)]


def collate(
    data: TokenizedExamples, indices: Sequence[int], packed: bool, pad_token_id: int = 0
) -> Batch:
    """Lay the examples `indices` end to end (`packed`), or in rows padded on the right."""
    ids = [data.ids[data.offsets[i] : data.offsets[i + 1]] for i in indices]
    labels = [data.labels[data.offsets[i] : data.offsets[i + 1]] for i in indices]
    lengths = [data.length(i) for i in indices]
    learned = sum(data.labelled[i] for i in indices)
    if packed:
        positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        flat = [torch.cat(part).long().unsqueeze(0) for part in (ids, labels)]
        return Batch(flat[0], flat[1], positions, None, len(lengths), sum(lengths), learned)
    mask = torch.arange(max(lengths)).unsqueeze(0) < torch.tensor(lengths).unsqueeze(1)
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id).long()
    padded_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED).long()
    return Batch(input_ids, padded_labels, None, mask.long(), len(lengths), sum(lengths), learned)
