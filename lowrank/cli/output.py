"""What a command came to: text for people, or with --json one object for machines."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def show(args: argparse.Namespace, text: str, values: Mapping[str, Any]) -> None:
    """Print `text`, or with --json the `values`, paths as text and what is not finite as null."""
    print(json.dumps(_plain(values), ensure_ascii=False) if args.json else text, file=args.out)


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as text, every column as wide as its widest cell."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def _plain(value: Any) -> Any:
    """`value` as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)
