"""Batches say the same to every side, and adapters begin alike under every side's names."""

from __future__ import annotations

import random

import torch
from torch import nn

from benchmarks.training_data import (
    BATCH,
    IGNORED,
    POSITIONS,
    adapted_elements,
    initialise_adapter,
    labelled_tokens,
    packed,
    padded,
    padding_share,
    real_tokens,
)
from benchmarks.training_step import operations


def batch() -> list[dict[str, list[int]]]:
    examples = []
    for _ in range(BATCH):
        prompt, completion = random.randint(1, 60), random.randint(1, 60)
        ids = [random.randrange(1000) for _ in range(prompt + completion)]
        examples.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return examples


def test_padded_and_packed_predict_the_same_words():
    examples = batch()
    wide, long = padded(examples), packed(examples)
    assert wide["input_ids"].shape == (BATCH, POSITIONS)
    assert int(wide["attention_mask"].sum()) == real_tokens(examples) == long["input_ids"].numel()
    mask = wide["attention_mask"].bool()
    assert torch.equal(wide["input_ids"][mask], long["input_ids"][0])
    assert torch.equal(wide["labels"][mask], long["labels"][0])  # a prompt has no label of its own
    assert (wide["labels"][~mask] == IGNORED).all()
    starts = long["position_ids"][0] == 0
    assert int(starts.sum()) == BATCH
    assert (long["labels"][0][starts] == IGNORED).all()


def test_the_first_token_of_a_packed_example_is_never_predicted():
    example = {"input_ids": [5, 6], "labels": [5, 6]}
    assert packed([example, example])["labels"].tolist() == [[IGNORED, 6, IGNORED, 6]]


def test_labelled_tokens():
    examples = [{"input_ids": [4, 5, 6], "labels": [IGNORED, 5, 6]}]
    assert labelled_tokens(examples) == 2
    assert labelled_tokens([{"input_ids": [5, 6], "labels": [5, 6]}]) == 1


def test_operations_are_those_of_the_matmuls():
    model = adapted(2)
    assert adapted_elements(model) == 2 * 16 * 24
    trainable = sum(p.numel() for p in model.parameters())
    assert trainable == 2 * 4 * (16 + 24)
    # T tokens through N·K and the adapter, forward and backward; labels through the head
    assert operations(16 * 24, 4 * (16 + 24), 90 * 16, 10, 3) == (
        10 * 4 * 16 * 24 + 10 * 6 * 4 * (16 + 24) + 3 * 4 * 90 * 16
    )


def test_padding_share():
    example = {"input_ids": [1] * 32, "labels": [1] * 32}
    assert padding_share([[example] * BATCH] * 3) == 1 - 32 / POSITIONS


def adapted(depth: int) -> nn.Module:
    """lora_A and lora_B of two layers under `depth` levels of wrapping, as PEFT adds them."""
    layer = nn.ModuleDict(
        {
            "lora_A": nn.ModuleDict({"default": nn.Linear(24, 4, bias=False)}),
            "lora_B": nn.ModuleDict({"default": nn.Linear(4, 16, bias=False)}),
        }
    )
    twin = nn.ModuleDict(
        {
            "lora_A": nn.ModuleDict({"default": nn.Linear(24, 4, bias=False)}),
            "lora_B": nn.ModuleDict({"default": nn.Linear(4, 16, bias=False)}),
        }
    )
    model = nn.ModuleDict({"layers": nn.ModuleList([layer, twin])})
    for _ in range(depth):
        model = nn.ModuleDict({"model": model})
    return model


def test_adapters_begin_alike_whatever_wraps_them():
    one, other = adapted(0), adapted(3)
    assert initialise_adapter(one) == initialise_adapter(other) == 2
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    first, second = (p.detach() for name, p in one.named_parameters() if "lora_A" in name)
    assert not torch.equal(first, second)
    assert float(first.abs().max()) <= 24**-0.5
    assert all(p.count_nonzero() == 0 for name, p in one.named_parameters() if "lora_B" in name)
