"""On a CPU chunks are used where their file is mapped, by threads that each do all for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial
from threading import Barrier, Lock

import torch

from .rings import Away, Use, Visit
from .tiers import Home, drop, populate


class Workers:
    """At most `most` threads, each with a share of torch's own and with one chunk at a time.

    A worker populates the pages of a chunk, computes with them, and drops them. One thread that
    only paged would take a core from those that compute, and these would wait for one another at
    the end of every chunk. Where torch has one thread, there are two that compute in turn.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._pool: ThreadPoolExecutor | None = None
        self._threads = 0  # of torch, that the workers share

    def walk(self, near: Sequence[Visit], away: Sequence[Away], use: Use) -> None:
        """Whatever comes first. An error is raised when no worker has a chunk any more."""
        threads = torch.get_num_threads()
        computing = nullcontext() if threads > 1 else Lock()

        def use_near(visit: Visit) -> None:
            with computing:
                use([visit])

        def use_away(chunk: int, home: Home, blank: bool) -> None:
            populate(home.memory)
            try:
                with computing:
                    use([Visit(chunk, home.memory, blank, stays=True)])
            finally:
                drop(home.memory)

        jobs = [partial(use_away, *a) for a in away] + [partial(use_near, v) for v in near]
        self._share(jobs, threads)

    def drain(self) -> None:
        """Between two walks everything is at home."""

    def _share(self, jobs: list[Callable[[], None]], threads: int) -> None:
        left = iter(jobs)  # of a list: threads may share it

        def work() -> None:
            with torch.no_grad():
                for job in left:
                    job()

        count = max(2, min(self._most, threads))
        if self._pool is None or threads != self._threads:
            self._pool, self._threads = _pool(count, threads), threads
        working: list[Future[None]] = []
        try:
            for _ in range(count):
                working.append(self._pool.submit(work))
            wait(working, return_when=FIRST_EXCEPTION)
        finally:
            for _ in left:
                pass  # nobody begins another
            wait(working)
        for one in working:
            one.result()


def _pool(count: int, threads: int) -> ThreadPoolExecutor:
    """`count` threads, for which torch computes with `threads` together."""
    pool = ThreadPoolExecutor(count, "lowrank-pages")
    all_there = Barrier(count + 1)

    def begin(mine: int) -> None:
        torch.get_num_threads()  # what a thread first asks of torch gives it as many as others
        torch.set_num_threads(mine)  # in this thread, and in those that begin later
        all_there.wait()

    try:
        for i in range(count):
            pool.submit(begin, max(1, threads // count + (i < threads % count)))
        all_there.wait()
    except BaseException:
        all_there.abort()  # else they would wait for ever
        raise
    finally:
        torch.set_num_threads(threads)  # in those that begin later
    return pool
