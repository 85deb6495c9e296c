"""Pictures from the JSON of a run: what they share, and codebook_linear's speeds over M."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.errors import UsageError
from benchmarks.installed import LINEAR_SIDES

MARKERS = {"fp32": "o", "bf16": "s", "fp16": "^"}
COLOURS = (
    "#1f6fb4", "#222222", "#e07b1a", "#2a9d3a", "#c4302b", "#8a5fbf",
    "#8c564b", "#d869b4", "#8f8f1e", "#18a7b5", "#9a9a9a", "#5f4bff",
)  # fmt: skip


def plot(result: dict, path: Path) -> None:
    """Write the figure as a PNG. Raises UsageError as `figure_of` does."""
    save(figure_of(result), path)


def figure_of(result: dict):
    """Speed beside dense torch over M, a panel for each shape and direction.

    Raises UsageError without codebook_linear in the run, or without matplotlib.
    """
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in result["rows"]:
        match = re.fullmatch(r"(.*) M=(\d+) (.*)", row["case"])
        if row["benchmark"] == "codebook_linear" and match and row["contender"] != row["baseline"]:
            lines.setdefault((f"{match[1]}, {match[3]}", row["contender"]), []).append(
                (int(match[2]), row["speed"])
            )
            baseline = row["baseline"]
    if not lines:
        raise UsageError("--plot: the run holds no codebook_linear beside a baseline")
    pyplot = load_pyplot("--plot")
    looks = looks_of(name for _, name in lines)
    panels = list(dict.fromkeys(panel for panel, _ in lines))
    figure, axes = panels_of(pyplot, panels, sharey=True)
    for panel, axis in zip(panels, axes, strict=False):
        for (where, name), points in lines.items():
            if where == panel:
                axis.plot(*zip(*sorted(points), strict=True), label=name, **looks[name])
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="M, rows of x", title=panel)
        axis.set_ylabel(f"speed, {baseline} = 1")
    return finish(figure, axes, result)


def load_pyplot(option: str):
    """matplotlib.pyplot, without a display. Raises UsageError."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(f"{option} needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def looks_of(names: Iterable[str]) -> dict[str, dict]:
    """A colour for each side, the same in every panel and dtype, and a marker for each dtype."""
    names = list(dict.fromkeys(names))
    sides = list(dict.fromkeys((*LINEAR_SIDES, *map(side_of, names))))
    looks = {}
    for name in names:
        ours = name.startswith("lowrank")
        looks[name] = {
            "color": COLOURS[sides.index(side_of(name)) % len(COLOURS)],
            "marker": next((mark for dtype, mark in MARKERS.items() if dtype in name), "o"),
            "markersize": 6 if ours else 4.5,
            "linewidth": 1.6 if ours else 0.7,
            "zorder": 3 if ours else 2,
        }
    return looks


def side_of(name: str) -> str:
    """A contender's name without its dtype."""
    return re.sub(rf" ({'|'.join(MARKERS)})\b", "", name)


def panels_of(pyplot, panels: list[str], sharey: bool = False) -> tuple:
    """A figure with room for the panels, two in a row, and their axes in order."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(6.2 * columns + 2.6, 4.6 * rows + 0.4),
        squeeze=False,
        sharey=sharey,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    return figure, list(axes.flat[: len(panels)])


def finish(figure, axes: list, result: dict):
    """The figure with one legend outside the panels and the machine above them."""
    labelled = {}
    for axis in axes:
        axis.grid(alpha=0.3)
        handles, names = axis.get_legend_handles_labels()
        labelled |= dict(zip(names, handles, strict=True))
    figure.legend(labelled.values(), labelled.keys(), loc="outside right upper", fontsize=8)
    machine = result["machine"]
    where = machine["device"] if "capability" in machine else machine["cpu"]
    figure.suptitle(f"{where}, {machine['threads']} threads, {result['run']['date']}", fontsize=9)
    return figure


def save(figure, path: Path) -> None:
    """Write a PNG, and forget the figure."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
