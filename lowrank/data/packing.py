"""Which examples share a pack of at most so many tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence


def best_fit_decreasing(
    lengths: Sequence[int], order: Sequence[int], capacity: int
) -> list[list[int]]:
    """Put the examples `order` into packs of at most `capacity` tokens, few of them.

    The longest first, each into the fullest pack that still has room for it, or into a new one.
    An example longer than `capacity` is a pack by itself. Examples of one length go in the order
    given; how many packs there are does not depend on it.   D. S. Johnson, Near-optimal bin
    packing algorithms, MIT, 1973: at most 11/9 of the fewest possible, and 4 more.
    """
    packs: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # tokens free -> packs
    rooms = 0  # bit t is set where some pack has t tokens free: the least that fits is one bit scan
    for i in sorted(order, key=lambda i: -lengths[i]):
        length = lengths[i]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = max(capacity, length), len(packs)
            packs.append([])
        packs[pack].append(i)
        if room > length:
            with_room[room - length].append(pack)
            rooms |= 1 << (room - length)
    return packs
