"""How a batch is laid out, against the same written out."""

from __future__ import annotations

import random

import pytest
import torch

from lowrank.data import collate, load_examples, tokenize_all


def ragged(count: int) -> list[dict]:
    rows = []
    for _ in range(count):
        ids = random.choices(range(1, 99), k=random.randint(2, 12))
        labels = [-100 if random.random() < 0.4 else token for token in ids]
        labels[-1] = ids[-1]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def unlearned_first(row: dict) -> list[int]:
    return [-100, *row["labels"][1:]]


@pytest.mark.parametrize("packs", [[[0]], [[1], [0]], [[3, 1], [0]], [[2], [4, 5, 0], [1, 3]]])
def test_layouts(packs):
    examples = ragged(6)
    data = tokenize_all(load_examples(examples), None)
    rows = [[examples[i] for i in pack] for pack in packs]
    every = [example for row in rows for example in row]

    flat = collate(data, packs, end_to_end=True)
    assert flat.input_ids.tolist() == [sum((example["input_ids"] for example in every), [])]
    assert flat.labels.tolist() == [sum(map(unlearned_first, every), [])]
    assert flat.position_ids.tolist() == [[p for e in every for p in range(len(e["labels"]))]]
    assert flat.attention_mask is None

    padded = collate(data, packs, end_to_end=False, pad_token_id=77)
    lengths = [[len(example["labels"]) for example in row] for row in rows]
    width = max(map(sum, lengths))
    pad = [width - sum(row) for row in lengths]
    expected = [
        sum((e["input_ids"] for e in row), []) + [77] * p for row, p in zip(rows, pad, strict=True)
    ]
    assert padded.input_ids.tolist() == expected
    expected = [
        sum(map(unlearned_first, row), []) + [-100] * p for row, p in zip(rows, pad, strict=True)
    ]
    assert padded.labels.tolist() == expected
    if max(map(len, packs)) == 1:
        assert padded.position_ids is None
        assert padded.attention_mask.tolist() == [[1] * (width - p) + [0] * p for p in pad]
    else:
        positions = [[p for n in row for p in range(n)] for row in lengths]
        assert padded.position_ids.tolist() == [
            row + [0] * p for row, p in zip(positions, pad, strict=True)
        ]
        for b, (row, p) in enumerate(zip(lengths, pad, strict=True)):
            blocks = [torch.ones(n, n).tril() for n in row] + [torch.eye(p)]
            assert torch.equal(padded.attention_mask[b, 0], torch.block_diag(*blocks).bool())

    learned = sum(label != -100 for example in every for label in unlearned_first(example))
    tokens = sum(map(sum, lengths))
    for batch in (flat, padded):
        assert (batch.examples, batch.tokens, batch.labelled) == (len(every), tokens, learned)
        assert {batch.input_ids.dtype, batch.labels.dtype} == {torch.int64}
        assert batch.to(torch.device("cpu")) is batch
        there = batch.to(torch.device("meta"))
        assert there.input_ids.is_meta and there.labels.is_meta and there.tokens == batch.tokens
