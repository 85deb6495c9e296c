"""Which examples a step takes, and how a batch is laid out, against both written out."""

from __future__ import annotations

import random

import pytest
import torch

from lowrank.data import (
    collate,
    epoch_order,
    load_examples,
    step_batches,
    steps_per_epoch,
    tokenize_all,
)


def ragged(count: int) -> list[dict]:
    rows = []
    for _ in range(count):
        ids = random.choices(range(1, 99), k=random.randint(2, 12))
        labels = [-100 if random.random() < 0.4 else token for token in ids]
        labels[-1] = ids[-1]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


@pytest.mark.parametrize(
    "count, batch, accumulation", [(1, 1, 1), (17, 2, 3), (12, 3, 2), (5, 8, 2)]
)
def test_every_epoch_takes_every_example_once(seed, count, batch, accumulation):
    consumed, seen, sizes = 0, [], []
    for _ in range(3 * steps_per_epoch(count, batch * accumulation)):
        parts = step_batches(count, batch, accumulation, seed, consumed)
        assert all(len(part) == batch for part in parts[:-1]) and 0 < len(parts[-1]) <= batch
        assert parts == step_batches(count, batch, accumulation, seed, consumed)
        seen += [i for part in parts for i in part]
        sizes.append(sum(map(len, parts)))
        consumed += sizes[-1]
    assert consumed == 3 * count
    for epoch in range(3):
        taken = seen[epoch * count : (epoch + 1) * count]
        assert sorted(taken) == list(range(count)) and taken == epoch_order(count, seed, epoch)
    assert all(size == batch * accumulation for size in sizes if size != sizes[-1])


@pytest.mark.parametrize("count", [1, 2, 7])
def test_layouts(count):
    rows = ragged(9)
    data = tokenize_all(load_examples(rows), None)
    indices = random.sample(range(9), count)
    chosen = [rows[i] for i in indices]
    first_unlearned = [[-100, *row["labels"][1:]] for row in chosen]
    lengths = [len(row["input_ids"]) for row in chosen]

    packed = collate(data, indices, packed=True)
    assert packed.input_ids.tolist() == [sum((row["input_ids"] for row in chosen), [])]
    assert packed.labels.tolist() == [sum(first_unlearned, [])]
    assert packed.position_ids.tolist() == [[p for n in lengths for p in range(n)]]
    assert packed.attention_mask is None

    width = max(lengths)
    padded = collate(data, indices, packed=False, pad_token_id=77)
    pad = [width - n for n in lengths]
    expected = [row["input_ids"] + [77] * p for row, p in zip(chosen, pad, strict=True)]
    assert padded.input_ids.tolist() == expected
    expected = [labels + [-100] * p for labels, p in zip(first_unlearned, pad, strict=True)]
    assert padded.labels.tolist() == expected
    assert padded.attention_mask.tolist() == [[1] * n + [0] * (width - n) for n in lengths]
    assert padded.position_ids is None

    learned = sum(label != -100 for labels in first_unlearned for label in labels)
    for batch in (packed, padded):
        assert (batch.examples, batch.tokens, batch.labelled) == (count, sum(lengths), learned)
        assert {batch.input_ids.dtype, batch.labels.dtype} == {torch.int64}
        assert batch.to(torch.device("cpu")) is batch
        there = batch.to(torch.device("meta"))
        assert there.input_ids.is_meta and there.labels.is_meta and there.tokens == batch.tokens
