"""How the examples of a micro-batch lie in its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lowrank.data.tokens import IGNORED, TokenizedExamples


@dataclass(frozen=True)
class Batch:
    """Token ids for one forward.

    End to end: input_ids, labels, position_ids [1, T], positions restarting at 0 with each example.
    Rows: input_ids, labels [B, S], padded on the right with labels of -100, and attention_mask
    [B, S]. Rows of packs: position_ids [B, S] too, and attention_mask [B, 1, S, S], true where a
    query may look: back in its own example.
    The first label of each example is -100. `tokens` counts the real tokens of its `examples`,
    `labelled` those that are learned; `numbers` are the examples' numbers in their data.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    examples: int
    tokens: int
    labelled: int
    numbers: tuple[int, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; itself if it is there."""
        if self.input_ids.device == device:
            return self
        names = ("input_ids", "labels", "position_ids", "attention_mask")
        there = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(
            self, **{name: tensor.to(device, non_blocking=True) for name, tensor in there.items()}
        )


def collate(
    data: TokenizedExamples,
    rows: Sequence[Sequence[int]],
    end_to_end: bool,
    pad_token_id: int = 0,
) -> Batch:
    """Lay out `rows` of examples, given by number: all of them end to end, or each in its row."""
    indices = [i for row in rows for i in row]
    lengths = [[data.length(i) for i in row] for row in rows]
    count = (len(indices), sum(map(sum, lengths)), sum(data.labelled[i] for i in indices))
    count += (tuple(indices),)
    ids, labels, positions = (
        [torch.cat(parts) for parts in tensors]
        for tensors in (
            [[data.ids[data.span(i)] for i in row] for row in rows],
            [[data.labels[data.span(i)] for i in row] for row in rows],
            [[torch.arange(length) for length in row] for row in lengths],
        )
    )
    if end_to_end:
        flat = [torch.cat(parts).long().unsqueeze(0) for parts in (ids, labels, positions)]
        return Batch(*flat, None, *count)
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id).long()
    padded_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED).long()
    if len(indices) == len(rows):
        mask = torch.arange(input_ids.shape[1]) < torch.tensor(lengths)  # [B, S]
        return Batch(input_ids, padded_labels, None, mask.long(), *count)
    # 0 is the padding, which sees only itself: softmax over nothing would be NaN
    numbers = [
        torch.arange(1, len(row) + 1).repeat_interleave(torch.tensor(row)) for row in lengths
    ]
    example = pad_sequence(numbers, batch_first=True)  # [B, S]
    S = example.shape[1]
    same = (example[:, :, None] == example[:, None, :]) & (example != 0)[:, None, :]
    mask = (same & torch.ones(S, S, dtype=torch.bool).tril()) | torch.eye(S, dtype=torch.bool)
    return Batch(
        input_ids, padded_labels, pad_sequence(positions, batch_first=True), mask[:, None], *count
    )
