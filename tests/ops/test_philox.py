"""Dropout's random bits: known answers, how many are kept, and that they depend on place alone."""

from __future__ import annotations

import pytest
import torch

from lowrank.ops.reference.philox import kept, philox, threshold

# kat_vectors of Random123, the lines "philox4x32 7"
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_kept_fraction(p, seed):
    mask = kept(torch.arange(300), 1023, p, torch.tensor(seed))
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.double().mean().item() - (1 - p)) < 5 * deviation
    # no row and no column is another's, and none is favoured
    for dim in (0, 1):
        means = mask.double().mean(dim)
        assert (means - (1 - p)).abs().max() < 6 * (p * (1 - p) / mask.shape[dim]) ** 0.5
        assert torch.unique(mask, dim=1 - dim).shape == mask.shape


def test_a_mask_is_a_function_of_seed_row_and_column(seed):
    seeds = torch.tensor([seed, seed + 1, seed + (1 << 32), -seed])
    masks = [kept(torch.arange(9), 37, 0.5, s) for s in seeds]
    some = torch.tensor([7, 0, 3])
    assert torch.equal(kept(some, 37, 0.5, seeds[0]), masks[0][some])
    for i in range(4):
        for j in range(i):
            assert 0.3 < (masks[i] == masks[j]).double().mean() < 0.7


def test_rows_beyond_32_bits():
    far = torch.tensor([2**34, 2**34 + 1, 2**35])  # the counter's second word
    mask = kept(far, 640, 0.5, torch.tensor(3))
    near = kept(far & 0xFFFF, 640, 0.5, torch.tensor(3))
    assert torch.unique(torch.cat((mask, near)), dim=0).shape[0] == 5  # far[0] and far[2] meet at 0


def test_threshold():
    assert threshold(0.5) == 2**31 and threshold(0.0) == 0
    assert threshold(1 - 2**-50) == 2**32 - 1  # a uint32 still
