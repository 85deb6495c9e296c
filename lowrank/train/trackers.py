"""Programs that show runs side by side, told of every step: TensorBoard, Weights & Biases, Trackio.

Each is asked for by `TrainConfig.report_to`. One that fails on the way is given up with a warning:
what is trained is worth more than how it is shown.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lowrank.errors import MissingPackageError

logger = logging.getLogger("lowrank.train")

TENSORBOARD = "tensorboard"  # the folder of its files within the run's


class Tracker(Protocol):
    """One such program; any exception of it is caught."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in the folder `tensorboard` of the run's directory."""

    def __init__(self, directory: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / TENSORBOARD))
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```")

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases: the one that is open, or one of our own."""

    def __init__(self, directory: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run, self._ours = wandb.run, wandb.run is None
        if self._run is None:
            # what wandb's own variable says comes before the default of a config
            project = os.environ.get("WANDB_PROJECT", project)
            self._run = wandb.init(
                project=project, name=name, dir=str(directory), config=dict(config)
            )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        if self._ours:
            self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of Trackio, kept where that package keeps its runs."""

    def __init__(self, directory: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        import trackio

        self._module = trackio
        trackio.init(project=project, name=name, config=dict(config), embed=False)

    def log(self, values: dict[str, float], step: int) -> None:
        self._module.log(values, step=step)

    def close(self, failed: bool) -> None:
        self._module.finish()


# name -> the class, what it imports, and the package that has it
TRACKERS: dict[str, tuple[Callable[..., Tracker], str, str]] = {
    "tensorboard": (TensorBoard, "torch.utils.tensorboard", "tensorboard"),
    "wandb": (WandB, "wandb", "wandb"),
    "trackio": (Trackio, "trackio", "trackio"),
}


def tracker_names(report_to: str | list[str] | None) -> list[str]:
    """The names in TrainConfig.report_to."""
    if report_to is None or report_to == "none":
        return []
    return [report_to] if isinstance(report_to, str) else report_to


def check_installed(names: Iterable[str]) -> None:
    """MissingPackageError for a tracker whose package is not here."""
    for name in names:
        _, module, package = TRACKERS[name]
        try:
            importlib.import_module(module)
        except ImportError:
            raise MissingPackageError(
                f"report_to={name!r} needs {package}: pip install {package}"
            ) from None


class Trackers:
    """All the trackers of a run; one that raises is warned of, and told no more."""

    def __init__(
        self,
        names: Iterable[str],
        directory: Path | None = None,
        project: str = "lowrank",
        name: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._open: dict[str, Tracker] = {}
        for tracker in names:
            with self._guard(tracker):
                make = TRACKERS[tracker][0]
                self._open[tracker] = make(directory, project, name, config or {})

    def step(self, line: Mapping[str, Any]) -> None:
        """Tell of a step, by its line of metrics.jsonl."""
        speed = {"tokens_per_second": line["tokens"] / line["seconds"]}
        self._log("train", {**line, **speed})

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Tell of an evaluation, by its line."""
        self._log("eval", {key.removeprefix("eval_"): value for key, value in line.items()})

    def close(self, failed: bool = False) -> None:
        """End all of them."""
        for name, tracker in list(self._open.items()):
            with self._guard(name):
                tracker.close(failed)
        self._open.clear()

    def _log(self, group: str, line: Mapping[str, Any]) -> None:
        values = {f"{group}/{key}": value for key, value in line.items() if key != "step"}
        for name, tracker in list(self._open.items()):
            with self._guard(name):
                tracker.log(values, line["step"])

    @contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever another package raises, the run goes on
            self._open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning("report_to: %s failed and is told no more: %s", name, reason)
