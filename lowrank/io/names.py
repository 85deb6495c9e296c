"""Whether the tensors of a file are those that a model takes, and if not, all that differs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lowrank.errors import FileFormatError

_MOST = 12  # listed of one kind: a model of another family differs in everything
_LONGEST = 200  # characters of a name, which in a damaged file may be anything


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    source: str | Path,
) -> None:
    """Raises FileFormatError that lists every name in one of them alone, or of another shape."""
    shapes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name in sorted(expected.keys() & found.keys()):
        if tuple(expected[name]) != tuple(found[name]):
            shapes.setdefault((tuple(expected[name]), tuple(found[name])), []).append(name)
    misshaped = [
        f"{name}: expected shape {wanted}; got {got}"
        for (wanted, got), names in shapes.items()
        for name in folded(names)
    ]
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    _refuse(source, missing, unexpected, misshaped)


def check_names(missing: Iterable[str], unexpected: Iterable[str], source: str | Path) -> None:
    """Raises FileFormatError, which lists them, if there are any."""
    _refuse(source, missing, unexpected, [])


def folded(names: Iterable[str]) -> list[str]:
    """The names, sorted, those that differ in one number alone as one: layers.[0-3,7].up.weight."""
    for at in range(max((name.count(".") for name in names), default=-1) + 1):
        names = _folded_at(names, at)
    return list(names)


def listed(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(map(plain, names[:_MOST])) + more


def plain(name: str) -> str:
    """A name from a file, in one line and short enough to be shown."""
    name = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…"
    return name if name.isprintable() else ascii(name)


def _folded_at(names: Iterable[str], at: int) -> list[str]:
    """With the numbers at the place `at` between the dots taken together."""
    numbers: dict[tuple[str | None, ...], list[int]] = {}
    for name in names:
        parts = name.split(".")
        if at < len(parts) and re.fullmatch("0|[1-9][0-9]{0,8}", parts[at]):
            numbers.setdefault((*parts[:at], None, *parts[at + 1 :]), []).append(int(parts[at]))
        else:
            numbers.setdefault(tuple(parts), [])
    return sorted(
        ".".join(_ranges(found) if part is None else part for part in parts)
        for parts, found in numbers.items()
    )


def _ranges(numbers: Iterable[int]) -> str:
    """3 of [3], and [0-2,5] of [0, 1, 2, 5]."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    said = ",".join("-".join(map(str, run)) for run in runs)
    return said if said.isdecimal() else f"[{said}]"


def _refuse(
    source: str | Path, missing: Iterable[str], unexpected: Iterable[str], misshaped: list[str]
) -> None:
    lists = {
        "missing tensors: ": folded(missing),
        "unexpected tensors: ": folded(unexpected),
        "": misshaped,
    }
    said = [start + listed(names) for start, names in lists.items() if names]
    if said:
        raise FileFormatError(f"{source}: {'; '.join(said)}")
