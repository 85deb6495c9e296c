"""A bar over what takes longer than a moment."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

_QUIET_SECONDS = 2.0  # what takes less shows none


def bar(
    what: str, items: Iterable | None = None, total: int | None = None, quiet: bool = False
) -> Any:
    """`items` in a tqdm bar, or such a bar to `update()`, drawn if stderr is a terminal.

    Without tqdm, `items` as they are; if `quiet`, nothing is drawn.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    # None: drawn on a terminal; of processes that torchrun started, the first draws
    disable = True if quiet or os.environ.get("RANK", "0") != "0" else None
    return tqdm(items, desc=what, total=total, delay=_QUIET_SECONDS, leave=False, disable=disable)
