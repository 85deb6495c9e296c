"""What makes room when memory does not suffice for a step."""

from __future__ import annotations

import torch

from lowrank.train.feed import Feed
from lowrank.train.history import History
from lowrank.train.update import Update


def make_room(update: Update, history: History, feed: Feed, halves: bool) -> str | None:
    """Make room for the step to be taken again; returns what was done, None if nothing is left.

    A paged optimizer gives back what it holds on the device; then, if one may (`halves`), batches
    have half as many rows from here on. The gradient that was begun is dropped.
    """
    update.optimizer.zero_grad()
    evict = getattr(update.optimizer, "evict", None)
    if evict is not None and evict():
        return "the states of the optimizer leave the device"
    size = history.batch_size or feed.sampler.batch_size
    if not halves or size == 1:
        return None
    history.batch_size = size // 2
    rows = feed.sampler.batch_size * feed.sampler.accumulation // feed.ranks
    return (
        f"batches of {history.batch_size} in place of {size} from here on, "
        f"{-(-rows // history.batch_size)} to a step, which learns the same"
    )


def free_cached() -> None:
    """Give what torch keeps for later allocations back to the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
