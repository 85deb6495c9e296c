"""Read the next tensors while the last ones are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")


def read_ahead(items: Iterable[T], read: Callable[[T], U], use: Callable[[T, U], object]) -> None:
    """use(item, read(item)) of each in turn, read in another thread while the one before is used.

    Two results exist at once at most, if `use` keeps none. What `read` raises is raised where its
    result would have been used. Meanwhile torch has a thread less: with as many threads as cores,
    those beside the reader's wait for it at the end of every operation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        _run(items, read, use)
    finally:
        torch.set_num_threads(threads)


def _run(items: Iterable[T], read: Callable[[T], U], use: Callable[[T, U], object]) -> None:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as reader:
        before: tuple[T, Future[U]] | None = None
        for item in items:
            coming = item, reader.submit(read, item)
            if before is not None:
                use(before[0], before[1].result())
            before = coming  # the result that was used is let go before the next is asked for
        if before is not None:
            use(before[0], before[1].result())
