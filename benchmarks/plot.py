"""A picture of codebook_linear: speed beside dense float32 over M, from the JSON of a run."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.errors import UsageError


def plot(result: dict, path: Path) -> None:
    """Write a PNG. Raises UsageError without codebook_linear in the run, or without matplotlib."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in result["rows"]:
        match = re.fullmatch(r"(.*) M=(\d+) (forward.*)", row["case"])
        if row["benchmark"] == "codebook_linear" and match and row["contender"] != row["baseline"]:
            lines.setdefault((f"{match[1]}, {match[3]}", row["contender"]), []).append(
                (int(match[2]), row["speed"])
            )
    if not lines:
        raise UsageError("--plot: the run holds no codebook_linear beside a baseline")

    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from error

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys(panel for panel, _ in lines))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False, sharey=True
    )
    for panel, axis in zip(panels, axes[0], strict=True):
        for (where, name), points in lines.items():
            if where == panel:
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="M, rows of x", title=panel)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("speed, dense float32 F.linear = 1")
    axes[0][-1].legend()
    figure.suptitle(
        f"{result['machine']['cpu']}, {result['machine']['threads']} threads, "
        f"{result['run']['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
