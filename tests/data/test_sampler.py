"""Every epoch takes every example once, in steps that nothing but seed and position decide."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.data import Sampler, epoch_order
from lowrank.data.packing import best_fit_decreasing
from lowrank.errors import DataError

WAYS = [{}, {"pack_to": 40}, {"group_by_length": True}]


def lengths(count: int) -> list[int]:
    return [random.randint(1, 40) for _ in range(count)]


def steps(sampler: Sampler, epochs: int) -> list[list]:
    """All steps of some epochs, in order."""
    found, consumed = [], 0
    while consumed < epochs * len(sampler.lengths):
        found.append(sampler.step(consumed))
        consumed += sum(len(row) for rows in found[-1] for row in rows)
    return found


def flat(step: list) -> list[int]:
    return [i for rows in step for row in rows for i in row]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(
    "count, batch, accumulation", [(1, 1, 1), (17, 2, 3), (12, 3, 2), (5, 8, 2), (200, 1, 3)]
)
def test_every_epoch_takes_every_example_once(seed, way, count, batch, accumulation):
    sampler = Sampler(lengths(count), batch, accumulation, seed, **way)
    found = steps(sampler, 3)
    assert len(found) == 3 * sampler.steps_per_epoch
    size = sampler.steps_per_epoch
    for epoch in range(3):
        of_epoch = found[epoch * size : (epoch + 1) * size]
        assert sorted(i for step in of_epoch for i in flat(step)) == list(range(count))
        for step in of_epoch[:-1]:
            assert [len(rows) for rows in step] == [batch] * accumulation
        assert all(len(rows) == batch for rows in of_epoch[-1][:-1])
        assert 0 < len(of_epoch[-1][-1]) <= batch and len(of_epoch[-1]) <= accumulation


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_step_depends_on_seed_and_position_alone(seed, way):
    many = lengths(60)
    found = steps(Sampler(many, 2, 2, seed, **way), 3)
    position = 0
    for step in found:  # each asked of a sampler of its own, whatever torch's generator did
        torch.manual_seed(position)
        epoch_order.cache_clear()
        assert Sampler(many, 2, 2, seed, **way).step(position) == step
        position += len(flat(step))
    orders = [tuple(map(str, steps(Sampler(many, 2, 2, s, **way), 1))) for s in (seed, seed + 1)]
    size = len(orders[0])
    orders += [tuple(map(str, found[n * size : (n + 1) * size])) for n in (1, 2)]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_split_into_micro_batches_changes_no_step(seed, way):
    many = lengths(75)
    splits = [(8, 1), (4, 2), (1, 8)]
    found = [list(map(flat, steps(Sampler(many, *split, seed, **way), 2))) for split in splits]
    assert found[0] == found[1] == found[2]


def test_a_plain_epoch_is_its_published_order(seed):
    found = steps(Sampler(lengths(30), 4, 1, seed), 2)
    taken = [i for step in found for i in flat(step)]
    assert taken == epoch_order(30, seed, 0) + epoch_order(30, seed, 1)


def test_the_order_depends_on_seed_and_epoch_alone(seed):
    orders = {(s, e): tuple(epoch_order(50, s, e)) for s in (seed, seed + 1) for e in range(3)}
    assert len(set(orders.values())) == 6
    torch.manual_seed(0)
    epoch_order.cache_clear()
    assert orders == {key: tuple(epoch_order(50, *key)) for key in orders}


def test_grouped_steps_are_of_similar_length_and_the_longest_comes_first(seed):
    many = lengths(403)
    for epoch in range(3):
        found = steps(Sampler(many, 2, 2, seed + epoch, group_by_length=True), 1)
        spread = [max(many[i] for i in flat(s)) - min(many[i] for i in flat(s)) for s in found]
        assert sum(spread) / len(spread) < 4  # of 40 at random
        assert max(many[i] for i in flat(found[0])) == max(many)
        firsts = [many[flat(step)[0]] for step in found]
        assert firsts != sorted(firsts, reverse=True)


def test_packs_are_full_and_a_position_within_one_is_refused(seed):
    many = lengths(300)
    sampler = Sampler(many, 4, 1, seed, pack_to=64)
    packs = [row for step in steps(sampler, 1) for rows in step for row in rows]
    filled = [sum(many[i] for i in pack) for pack in packs]
    assert max(filled) <= 64 and sum(filled) / (64 * len(packs)) > 0.95
    within = len(packs[0]) - 1
    assert within and sampler.step(0)[0][0] == packs[0]
    with pytest.raises(DataError, match=f"no pack begins after {within} of 300 examples"):
        sampler.step(within)


@settings(deadline=None, database=None, max_examples=40)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=60), st.integers(1, 64))
def test_best_fit_decreasing(lengths, capacity):
    """Against the rule written out: the longest next, into the fullest pack that takes it."""
    packs = best_fit_decreasing(lengths, range(len(lengths)), capacity)
    filled: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [tokens for tokens in filled if tokens + length <= capacity]
        if fitting:
            filled.remove(max(fitting))  # which of two equally full ones changes no number
        filled.append(max(fitting, default=0) + length)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert sorted(sum(lengths[i] for i in pack) for pack in packs) == sorted(filled)


def test_packs_are_as_full_as_those_of_trl():
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install datasets")
    trl = pytest.importorskip("trl.data_utils", reason="the oracle; pip install trl")
    many = lengths(500)
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in many]})
    theirs = trl.pack_dataset(rows, seq_length=64, strategy="bfd")
    packs = best_fit_decreasing(many, range(500), 64)
    filled = sorted(sum(many[i] for i in pack) for pack in packs)
    assert filled == sorted(map(len, theirs["input_ids"]))
