"""Read the next tensors while the last ones are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def read_ahead(items: Iterable[T], read: Callable[[T], U]) -> Iterator[tuple[T, U]]:
    """(item, read(item)) of each in turn, read in another thread while the one before is used.

    Two results exist at once at most, if the caller drops one when it takes the next. What `read`
    raises is raised where its result would have been.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        before: tuple[T, Future[U]] | None = None
        for item in items:
            coming = item, reader.submit(read, item)
            if before is not None:
                yield before[0], before[1].result()
            before = coming
        if before is not None:
            yield before[0], before[1].result()
