"""The roofline: operations per byte against operations per second, under the measured ceilings.

A row's intensity is what its task must compute over what it must move, so that a format which
moves fewer bytes stands further right. Williams et al., "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from benchmarks.ceilings import matmul_tflops
from benchmarks.errors import UsageError
from benchmarks.plot import finish, load_pyplot, looks_of, panels_of, save, side_of
from benchmarks.shapes import DTYPES

ROOF = {"color": "black", "linewidth": 1.4, "zorder": 1}
MARGIN = 2.0  # that the axes reach beyond the outermost points, as a factor


def draw(result: dict, path: Path) -> None:
    """Write the figure as a PNG. Raises UsageError as `figure_of` does."""
    save(figure_of(result), path)


def figure_of(result: dict):
    """A panel for each benchmark and direction, a marker for each row.

    Rows of one contender and shape are joined, M rising to the right. Raises UsageError where no
    row counts operations, or without matplotlib.
    """
    rows = [row for row in result["rows"] if row.get("flops") and row.get("moved")]
    if not rows:
        raise UsageError("--roofline: the run holds no rows that count operations and bytes")
    pyplot = load_pyplot("--roofline")
    looks = looks_of(map(named, rows))
    panels = list(dict.fromkeys(map(panel_of, rows)))
    figure, axes = panels_of(pyplot, panels)
    for panel, axis in zip(panels, axes, strict=True):
        here = [row for row in rows if panel_of(row) == panel]
        _points(axis, here, looks)
        _roof(axis, here, result["ceilings"])
        axis.set(xscale="log", yscale="log", title=panel)
        axis.set_xlabel("operations per byte that must move")
        axis.set_ylabel("operations per second, GFLOP/s")
    return finish(figure, axes, result)


def panel_of(row: dict) -> str:
    """The benchmark, and the direction with which its cases end."""
    match = re.search(r" (forward \+ \w+|forward|backward|dX)$", row["case"])
    return row["benchmark"] + (f", {match[1]}" if match else "")


def intensity(row: dict) -> float:
    """Operations per byte."""
    return row["flops"] / row["moved"]


def named(row: dict) -> str:
    """The contender with its dtype, where its name does not say it."""
    if side_of(row["contender"]) != row["contender"]:
        return row["contender"]
    short = {long: short for short, long in DTYPES.items()}
    return f"{row['contender']} {short[row.get('dtype', 'float32')]}"


def _points(axis, rows: list[dict], looks: dict[str, dict]) -> None:
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        rate = row["flops"] / row["median_ms"] * 1e-6  # GFLOP/s
        lines.setdefault((named(row), _shape(row["case"])), []).append((intensity(row), rate))
    for (name, _), points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), label=name, **looks[name])


def _shape(case: str) -> str:
    """What the points of one line have in common: the case without its rows of x."""
    return re.sub(r" [MT]=\d+", "", case)


def _roof(axis, rows: list[dict], limits: dict[str, float]) -> None:
    """Bandwidths as slopes, matmuls as levels, each with its name and rate beside it."""
    dtypes = dict.fromkeys(row.get("dtype", "float32") for row in rows)
    levels = {dtype: matmul_tflops(limits, dtype) * 1e3 for dtype in dtypes}
    slopes = {
        memory: limits[f"{memory}_gbs"] for memory in dict.fromkeys(r["memory"] for r in rows)
    }
    knee = min(levels.values()) / max(slopes.values())
    reach = [intensity(row) for row in rows]
    right = max(reach) * MARGIN
    left = min(*reach, knee) / MARGIN  # some of the slope is always seen
    for memory, slope in slopes.items():
        end = min(right, max(levels.values()) / slope)
        axis.plot([left, end], [slope * left, slope * end], **ROOF)
        middle = (left * end) ** 0.5
        angle = math.degrees(math.atan(slope))  # in the axes' own units
        _label(axis, middle, slope * middle, f"{memory} {slope:.0f} GB/s", angle)
    for dtype, level in levels.items():
        start = level / max(slopes.values())
        if start < right:
            axis.plot([start, right], [level, level], **ROOF)
            _label(axis, right, level, f"{dtype} matmul {level:.0f} GFLOP/s", align="right")


def _label(axis, x: float, y: float, text: str, angle: float = 0, align: str = "center") -> None:
    axis.text(
        x,
        y,
        text,
        fontsize=7,
        ha=align,
        va="bottom",
        rotation=angle,
        rotation_mode="anchor",
        transform_rotates_text=bool(angle),
    )
