"""Memory of a loader's own: what serves again does so only when nobody holds it."""

import pytest

from lowrank.io.pages import Reused, empty_bytes

BIG = 1 << 20


@pytest.mark.parametrize("n", [0, 1, 1000, BIG, BIG + 1])
def test_as_many_bytes_as_asked_for(n):
    reused = Reused()
    reused.empty(2 * BIG)  # dropped at once, and large enough for all
    for empty in (empty_bytes, reused.empty):
        tensor = empty(n)
        assert tensor.shape == (n,)
        assert tensor.fill_(7).sum() == 7 * n


def test_what_is_dropped_serves_again():
    reused = Reused()
    first = reused.empty(BIG)
    place = first.data_ptr()
    view = first[5:].view(-1)
    del first
    other = reused.empty(BIG)
    assert other.data_ptr() != place  # the view holds it
    del view
    assert reused.empty(BIG // 2).data_ptr() == place


def test_two_in_turn_stay_two():
    reused, places = Reused(), set()
    before = reused.empty(3 * BIG)
    for n in range(20):
        coming = reused.empty(BIG * (1 + n % 3))
        assert coming.data_ptr() != before.data_ptr()
        before = coming.fill_(n)
        if n >= 3:
            places.add(before.data_ptr())
    assert len(places) == 2


def test_what_is_held_is_never_given_again():
    reused = Reused()
    kept = [reused.empty(BIG).fill_(n) for n in range(4)]
    assert all(bool((tensor == n).all()) for n, tensor in enumerate(kept))
