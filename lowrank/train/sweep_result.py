"""What a sweep came to: its trials, the best, the elbow; as a table, a picture and JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank.io.atomic import write_files
from lowrank.io.versions import versions
from lowrank.train.plots import running_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lowrank.train.trainer import Trainer

logger = logging.getLogger("lowrank.train")

TABLE, DATA, PICTURE = "sweep.md", "sweep.json", "sweep.png"

ELBOW = 0.99  # the share of the best improvement that is good enough
_LAST = 10  # train_loss is the mean of the last of so many parts of a run


@dataclass
class Trial:
    """One adapter: `settings` of the grid, and what it came to.

    stage: scan, refine or longer. parameters: those that train. seconds: of its steps; of steps
    with others side by side, its share. train_loss: mean of the last tenth of the steps.
    eval_before, eval_loss: held out, the latter of what is saved, if training went to its end.
    failure: why it did not.
    """

    name: str
    stage: str
    settings: dict[str, Any]
    output_dir: Path
    parameters: int = 0
    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    eval_loss: float | None = None
    failure: str | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def r(self) -> int:
        return self.settings["r"]

    @property
    def train_loss(self) -> float | None:
        part = self.losses[-max(1, len(self.losses) // _LAST) :]
        return sum(part) / len(part) if part else None

    @property
    def eval_before(self) -> float | None:
        return self.eval_losses[0][1] if self.eval_losses else None

    def fill(
        self,
        trainer: Trainer,
        losses: Sequence[float],
        eval_losses: Sequence[tuple[int, float]],
        seconds: float,
        eval_loss: float | None,
    ) -> None:
        """Note what training came to."""
        self.parameters = sum(p.numel() for p in trainer.parameters.values())
        self.losses, self.eval_losses = list(losses), list(eval_losses)
        self.steps, self.seconds, self.eval_loss = len(losses), seconds, eval_loss
        self.about = trainer.resolved()


@dataclass
class SweepResult:
    """The trials of a sweep, in the order in which they were trained."""

    output_dir: Path
    grid: Mapping[str, Sequence[Any]]
    trials: list[Trial] = field(default_factory=list)
    interrupted: bool = False

    @property
    def ranking(self) -> list[Trial]:
        """The trials of equal length that were trained to their end, the best first."""
        equal = [t for t in self.trials if t.eval_loss is not None and t.stage != "longer"]
        return sorted(equal, key=lambda t: (t.eval_loss, t.parameters))

    @property
    def best(self) -> Trial | None:
        """The lowest held-out loss at equal length."""
        return next(iter(self.ranking), None)

    @property
    def elbow(self) -> Trial | None:
        """The smallest rank that has 99 % of the best trial's improvement of the held-out loss,
        with its other settings: what more rank buys is less than that.
        """
        best = self.best
        if best is None:
            return None
        others = {name: value for name, value in best.settings.items() if name != "r"}
        enough = best.eval_before - ELBOW * (best.eval_before - best.eval_loss)
        alike = [t for t in self.ranking if others.items() <= t.settings.items()]
        return min(
            (t for t in alike if t.eval_loss <= max(enough, best.eval_loss)), key=lambda t: t.r
        )

    def __str__(self) -> str:
        return table(self)

    def save(self) -> list[Path]:
        """Write sweep.md, sweep.json and, with matplotlib, sweep.png; nothing without a trial."""
        if not self.trials:
            return []
        write = partial(Path.write_text, encoding="utf-8")
        writers: dict[str, Callable[[Path], Any]] = {
            TABLE: partial(write, data=table(self) + "\n"),
            DATA: partial(write, data=json.dumps(self.to_dict(), indent=1) + "\n"),
        }
        try:
            figure = picture(self)
            writers[PICTURE] = lambda aside: figure.savefig(aside, format="png", dpi=120)
        except ImportError:
            logger.warning("no plot: it needs matplotlib: pip install 'lowrank-torch[plots]'")
        write_files(self.output_dir, writers)
        return [self.output_dir / name for name in writers]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        best, elbow = self.best, self.elbow
        return {
            "grid": {name: list(values) for name, values in self.grid.items()},
            "best": best and best.name,
            "elbow": elbow and elbow.name,
            "interrupted": self.interrupted,
            "trials": [{**asdict(t), "output_dir": t.output_dir.name} for t in self.trials],
            "versions": versions(),
        }


def trial_name(settings: Mapping[str, Any], stage: str) -> str:
    """A name for files and an adapter, without dots and slashes: r8-lora_dropout-0_1."""
    parts = [f"r{settings['r']}"]
    parts += [f"{name}-{_plain(value)}" for name, value in settings.items() if name != "r"]
    return "-".join([*parts, "longer"] if stage == "longer" else parts)


def _plain(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in text)


def table(result: SweepResult) -> str:
    """Markdown: a line for each trial, then what was found."""
    names = list(dict.fromkeys(name for t in result.trials for name in t.settings))
    head = ["stage", *names, "parameters", "steps", "train loss", "held-out loss", "s a step", ""]
    lines = [head]
    best, elbow = result.best, result.elbow
    for t in result.trials:
        marks = ["best"] * (t is best) + ["elbow"] * (t is elbow)
        speed = f"{t.seconds / t.steps:.2f}" if t.steps else "–"
        numbers = [
            f"{t.parameters:,}",
            str(t.steps),
            _loss(t.train_loss),
            _loss(t.eval_loss),
            speed,
        ]
        settings = [_shown(t.settings[name]) for name in names]
        lines.append([t.stage, *settings, *numbers, t.failure or ", ".join(marks)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
    return "\n".join([text, *_words(result)])


def _words(result: SweepResult) -> list[str]:
    best, elbow = result.best, result.elbow
    if best is None or elbow is None:
        return ["", "No adapter was trained to its end."]
    said = [
        "",
        f"Held-out loss before training {best.eval_before:.4f}. Best: {best.name}, "
        f"{best.eval_loss:.4f}. Elbow: {elbow.name}, the smallest rank with {ELBOW:.0%} of that "
        "improvement.",
    ]
    ranks = {t.r for t in result.ranking}
    if len(ranks) > 1 and best.r == max(ranks):
        said.append("No larger rank was tried: more may be better still, or more steps.")
    longer = [t for t in result.trials if t.stage == "longer" and t.eval_loss is not None]
    if longer:
        first = min(longer, key=lambda t: t.eval_loss)
        said.append(f"Trained longer: {first.name}, {first.eval_loss:.4f}.")
    return said


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def picture(result: SweepResult) -> Figure:
    """Held-out loss over rank, and the training losses over steps. Raises ImportError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines: dict[str, list[Trial]] = {}
    for t in sorted(result.ranking, key=lambda t: t.r):
        others = {name: value for name, value in t.settings.items() if name != "r"}
        label = ", ".join(f"{name} {_shown(value)}" for name, value in others.items())
        lines.setdefault(label or "held out", []).append(t)
    for label, trials in lines.items():
        left.plot([t.r for t in trials], [t.eval_loss for t in trials], "o-", label=label)
    longer = [t for t in result.trials if t.stage == "longer" and t.eval_loss is not None]
    if longer:
        at = [t.r for t in longer], [t.eval_loss for t in longer]
        left.plot(*at, "s", color="black", label="trained longer")
    if result.elbow is not None:
        at = result.elbow.r, result.elbow.eval_loss
        left.annotate("elbow", at, (0, 18), textcoords="offset points", ha="center",
                      arrowprops={"arrowstyle": "->"})  # fmt: skip
    left.set_xscale("log", base=2)
    ranks = sorted({t.r for t in result.ranking})
    left.set_xticks(ranks, map(str, ranks))
    left.set(xlabel="rank", ylabel="held-out loss per token (nats)")
    left.margins(0.1, 0.15)
    for t in result.trials:
        smooth = running_mean(t.losses, max(1, len(t.losses) // _LAST))
        right.plot(range(1, len(smooth) + 1), smooth, linewidth=1, label=t.name)
    right.set(xlabel="step", ylabel="training loss per token, smoothed (nats)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc="upper right", fontsize=8)
    return figure
