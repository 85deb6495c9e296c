"""A report as pictures: error against bits, and errors layer by layer. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .result import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ERRORS, LAYERS = "error.png", "layers.png"
_MOST_NAMES = 48  # layers named beside the map
_POINT = 72 / 100  # of a pixel at 100 to the inch
_TALL, _WIDE = 12, 6  # pixels that a label takes: a line, a letter


def plots(report: Report) -> dict[str, Figure]:
    """{file name: figure}; none without a scheme that was measured. Raises ImportError."""
    rows = [row for row in report.measured if row.error > 0]
    if not rows:
        return {}
    return {ERRORS: _against_bits(report, rows), LAYERS: _by_layer(report, rows)}


def write_png(figure: Figure, path: Path) -> None:
    """Write the figure in 256 colours: a third of the bytes of all of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # matplotlib brings it

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    picture.convert("RGB").quantize(256).save(path, format="PNG", optimize=True)


def _against_bits(report: Report, rows: list[Row]) -> Figure:
    """Error over bits, and the loss above the dense weights' where there is a text."""
    from matplotlib.figure import Figure

    panels = [("error of the weights, ‖W − Q‖ / ‖W‖", [row.error for row in rows])]
    if any(row.output_error for row in rows):
        panels.append(("error of the outputs", [row.output_error for row in rows]))
    if report.loss is not None:
        panels.append(
            ("loss above the dense weights' (nats)", [row.loss - report.loss for row in rows])
        )
    figure = Figure(figsize=(6.4 * len(panels), 5.2), dpi=100, layout="tight")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, values) in zip(grid, panels, strict=True):
        points = [
            (row.bits, value, row.scheme + (" *" if row.favoured else ""))
            for row, value in zip(rows, values, strict=True)
            if value is not None and math.isfinite(value)
        ]
        axes.set(xlabel="bits a weight", title=title)
        if min((value for _, value, _ in points), default=0) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            if max(value for _, value, _ in points) < 10 * min(value for _, value, _ in points):
                axes.yaxis.set_minor_formatter("{x:g}")
        else:  # a scheme may happen to do better on a text than the dense weights
            axes.set_yscale("symlog", linthresh=1e-2)
        if points:
            _scatter(axes, points)
        axes.grid(alpha=0.3, which="both")
    figure.suptitle(_title(report), fontsize=9)
    figure.draw_without_rendering()  # the axes now have the size that labels are placed in
    for axes in figure.axes:
        _label(axes)
    return figure


def _scatter(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """The points, and a step line along those that no other beats in both."""
    best, least = [], math.inf
    for bits, value, _ in sorted(points):
        if value < least:
            best.append((bits, value))
            least = value
    axes.step(*zip(*best, strict=True), where="post", color="tab:blue", linewidth=1, alpha=0.5)
    axes.margins(0.12, 0.1)
    for bits, value, name in points:
        axes.plot([bits], [value], "o", markersize=5, label=name, color="tab:blue")


def _label(axes: Axes) -> None:
    """Write each point's name beside it, the nearest place where no other is."""
    points = [
        (line.get_xydata()[0], line.get_label())
        for line in axes.lines
        if len(line.get_xydata()) == 1
    ]
    places = [axes.transData.transform(at) for at, _ in points]
    left, right = axes.bbox.x0, axes.bbox.x1
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    order = sorted(range(len(points)), key=lambda i: -places[i][1])
    for i in order:
        (x, y), (at, name) = places[i], points[i]
        width = _WIDE * len(name)
        offsets = sorted(
            ((dx, dy) for dy in range(-120, 121, 4) for dx in (9, 24, 44, -width - 9, -width - 30)),
            key=lambda d: abs(d[1]) + (abs(d[0]) if d[0] > 0 else abs(d[0] + width) + 6),
        )
        dx, dy = next(
            (d for d in offsets if _free(x + d[0], y + d[1], width, taken, left, right)), offsets[0]
        )
        taken.append((x + dx, y + dy - _TALL / 2, x + dx + width, y + dy + _TALL / 2))
        axes.annotate(
            name,
            at,
            (dx * _POINT, dy * _POINT),
            textcoords="offset points",
            fontsize=8,
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "gray", "shrinkA": 0},
        )


def _free(x: float, y: float, width: float, taken: list, left: float, right: float) -> bool:
    if x < left or x + width > right:
        return False
    low, high = y - _TALL / 2, y + _TALL / 2
    return not any(x < x1 and x0 < x + width and low < y1 and y0 < high for x0, y0, x1, y1 in taken)


def _by_layer(report: Report, rows: list[Row]) -> Figure:
    """Each layer's error over the scheme's: which layers it serves worse than the others."""
    from matplotlib.figure import Figure

    names = list(rows[0].layers)
    values = [[row.layers[name].error / row.error for row in rows] for name in names]
    every = -(-len(names) // _MOST_NAMES)
    height = min(9.0, max(3.0, 0.17 * len(names) + 1.8))
    figure = Figure(figsize=(3.4 + 0.5 * len(rows), height), dpi=100, layout="tight")
    axes = figure.subplots()
    span = max(max(v, 1 / max(v, 1e-9)) for line in values for v in line)
    span = min(max(span, 1.05), 3.0)
    shown = axes.imshow(
        [[math.log2(max(v, 1e-9)) for v in line] for line in values],
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        vmin=-math.log2(span),
        vmax=math.log2(span),
    )
    axes.set_xticks(
        range(len(rows)), [row.scheme for row in rows], rotation=60, ha="right", fontsize=8
    )
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=6 if every > 1 else 7)
    bar = figure.colorbar(shown, label="error of the layer / error of the scheme")
    ticks = [1 / span, 1 / math.sqrt(span), 1, math.sqrt(span), span]
    bar.set_ticks([math.log2(t) for t in ticks], labels=[f"{t:.2f}" for t in ticks])
    axes.set_title(_title(report), fontsize=8)
    return figure


def _title(report: Report) -> str:
    before = report.about["quantized_before"]
    return str(report.about["model"]) + (
        f", weights that have been through {before} (* favoured)" if before else ""
    )
