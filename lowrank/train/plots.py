"""What metrics.jsonl holds, as a picture. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMOOTH_FROM = 40  # steps from which a running mean is drawn through the losses
_WINDOW = 20  # the share of the steps that it is taken over is 1 in this


def run_figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Losses over steps, and below them the learning rate. Raises ImportError."""
    from matplotlib.figure import Figure

    steps = [line for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    at, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    smooth = len(losses) >= _SMOOTH_FROM
    above.plot(
        at, losses, color="tab:blue", linewidth=1, alpha=0.35 if smooth else 1, label="train"
    )
    if smooth:
        window = len(losses) // _WINDOW
        label = f"train, mean of {window}"
        above.plot(at, running_mean(losses, window), color="tab:blue", label=label)
    if held_out:
        above.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    above.set_ylabel("loss per token (nats)")
    above.grid(alpha=0.3)
    above.legend(loc="upper right")  # a loss falls; "best" tries every point
    below.plot(at, [line["learning_rate"] for line in steps], color="tab:green", linewidth=1)
    below.set(xlabel="step", ylabel="learning rate")
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    below.grid(alpha=0.3)
    return figure


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, `window` of them at most."""
    sums = list(accumulate(values, initial=0.0))  # so that a long run with a wide window is quick
    begins = (max(0, end - window) for end in range(1, len(sums)))
    return [(sums[end] - sums[begin]) / (end - begin) for end, begin in enumerate(begins, start=1)]
