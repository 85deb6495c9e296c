"""Reading ahead: one result while the one before is used, in order, no more."""

import threading
import weakref

import pytest
import torch

from lowrank.io.ahead import read_ahead


class Result:
    def __init__(self, item):
        self.item = item


def test_every_item_comes_with_its_own_result_in_order():
    seen = []
    read_ahead(range(5), lambda item: item * 10, lambda *both: seen.append(both))
    assert seen == [(i, i * 10) for i in range(5)]
    read_ahead([], Result, seen.clear)
    assert len(seen) == 5


def test_the_next_is_read_while_the_first_is_used():
    second_began, second_may_end = threading.Event(), threading.Event()
    seen = []

    def read(item):
        if item == 1:
            second_began.set()
            assert second_may_end.wait(30)
        return item

    def use(item, result):
        if item == 0:
            assert second_began.wait(30)
            second_may_end.set()
        seen.append((item, result))

    read_ahead(range(3), read, use)
    assert seen == [(0, 0), (1, 1), (2, 2)]


def test_two_results_exist_at_once_at_most():
    alive: weakref.WeakSet[Result] = weakref.WeakSet()
    most = seen = 0

    def read(item):
        nonlocal most
        result = Result(item)
        alive.add(result)
        most = max(most, len(alive))
        return result

    def use(item, result):
        nonlocal seen
        assert result.item == item
        seen += 1

    read_ahead(range(50), read, use)
    assert seen == 50 and most == 2


def test_what_fails_is_raised_in_its_turn_and_nothing_is_read_after_it():
    read, seen = [], []

    def fails(item):
        read.append(item)
        if item == 2:
            raise OSError("no such tensor")
        return item

    with pytest.raises(OSError, match="no such tensor"):
        read_ahead(range(9), fails, lambda item, _: seen.append(item))
    assert seen == [0, 1] and len(read) <= 4


def test_a_use_that_fails_ends_the_thread():
    before = threading.active_count()

    def use(item, _):
        if item == 3:
            raise ValueError("at item 3")

    with pytest.raises(ValueError, match="at item 3"):
        read_ahead(range(100), Result, use)
    assert threading.active_count() == before


@pytest.mark.parametrize("fails", [False, True])
def test_one_thread_is_left_to_the_reader_and_given_back(fails):
    before, during = torch.get_num_threads(), []

    def use(item, _):
        during.append(torch.get_num_threads())
        if fails:
            raise ValueError(item)

    try:
        torch.set_num_threads(3)
        try:
            read_ahead([0], Result, use)
        except ValueError:
            assert fails
        assert during == [2] and torch.get_num_threads() == 3
        torch.set_num_threads(1)
        read_ahead([0], Result, lambda item, _: during.append(torch.get_num_threads()))
        assert during == [2, 1]
    finally:
        torch.set_num_threads(before)
