"""Reading ahead: one result while the one before is used, in order, no more."""

import threading
import weakref

import pytest

from lowrank.io.ahead import read_ahead


class Result:
    def __init__(self, item):
        self.item = item


def test_every_item_comes_with_its_own_result_in_order():
    assert list(read_ahead(range(5), lambda item: item * 10)) == [(i, i * 10) for i in range(5)]
    assert list(read_ahead([], Result)) == []


def test_the_next_is_read_while_the_first_is_used():
    second_began, second_may_end = threading.Event(), threading.Event()

    def read(item):
        if item == 1:
            second_began.set()
            assert second_may_end.wait(30)
        return item

    results = read_ahead(range(3), read)
    assert next(results) == (0, 0)
    assert second_began.wait(30)
    second_may_end.set()
    assert list(results) == [(1, 1), (2, 2)]


def test_two_results_exist_at_once_at_most():
    alive: weakref.WeakSet[Result] = weakref.WeakSet()
    most = 0

    def read(item):
        nonlocal most
        result = Result(item)
        alive.add(result)
        most = max(most, len(alive))
        return result

    seen = 0
    for item, result in read_ahead(range(50), read):
        assert result.item == item and len(alive) <= 2
        seen += 1
    assert seen == 50 and most <= 3  # the third may begin as the first is let go


def test_what_fails_is_raised_in_its_turn_and_nothing_is_read_after_it():
    read = []

    def fails(item):
        read.append(item)
        if item == 2:
            raise OSError("no such tensor")
        return item

    results, seen = read_ahead(range(9), fails), []
    with pytest.raises(OSError, match="no such tensor"):
        for item, _ in results:
            seen.append(item)
    assert seen == [0, 1] and len(read) <= 4


def test_leaving_early_ends_the_thread():
    before = threading.active_count()
    for item, _ in read_ahead(range(100), Result):
        if item == 3:
            break
    assert threading.active_count() == before
