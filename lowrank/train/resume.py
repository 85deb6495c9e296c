"""Going on with a run from a checkpoint, as if it had never ended, or saying why not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank.errors import ConfigError, FileFormatError
from lowrank.io.json_files import read_json
from lowrank.io.safetensors import load_safetensors
from lowrank.train.checkpoint import (
    MANIFEST,
    checkpoints,
    newest_checkpoint,
    remove_checkpoints,
    step_of,
    verify_checkpoint,
)
from lowrank.train.config import TrainConfig
from lowrank.train.distributed import Ranks
from lowrank.train.history import History
from lowrank.train.identity import differences
from lowrank.train.run import metrics_lines
from lowrank.train.saving import STATE, TENSORS
from lowrank.train.sharding import gathered
from lowrank.train.state import join, set_rng_state
from lowrank.train.weights import load_weights

if TYPE_CHECKING:
    from lowrank.train.loop import Loop

logger = logging.getLogger("lowrank.train")


class Resumed:
    """The run that the checkpoint `path` is of, read and verified; FileFormatError if damaged."""

    def __init__(self, path: Path) -> None:
        verify_checkpoint(path)
        self.path = path
        self._read = read_json(path / STATE)
        self._state: dict[str, Any] = join(self._read, load_safetensors(path / TENSORS))

    @property
    def history(self) -> History:
        return History.from_dict(self._state["history"])

    def check(self, identity: dict[str, Any]) -> None:
        """ConfigError naming what this run and that one do not agree in."""
        found = differences(self._read["identity"], identity)
        if found:
            more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            raise ConfigError(
                f"{self.path} cannot be resumed: {'; '.join(found[:3])}{more}; only steps, batch "
                "split and output may change: set it as it was, or train in another output_dir"
            )

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of that run's metrics.jsonl as they were at the checkpoint."""
        history = self.history
        evaluated = {found["step"] for found in history.evaluations}
        return [
            line
            for line in metrics_lines(self.path.parent, last=history.steps)
            if "eval_loss" not in line or line["step"] in evaluated
        ]

    def restore(self, loop: Loop) -> None:
        """Give weights, optimizer and callbacks what they had; the history is the loop's already.

        The random numbers come last, with `restore_rng`, once nothing before the steps takes any.
        """
        with gathered(loop.model, back=True):
            load_weights(loop.model, self.path)
        loop.update.load_state_dict(self._state)
        loop.callbacks.load_state_dict(self._state["callbacks"])
        if loop.best is not None:
            loop.best.load_state_dict(self._state["best"])
        # a run that was to be longer is; else what ended it early counts still
        loop.stopped = self._state["stopped"] and loop.total_steps == self._state["total_steps"]
        done, total = loop.history.steps, loop.total_steps
        loop.record.say(f"resumed from {self.path}: {done} of {total} steps are done")

    def restore_rng(self, rank: int = 0) -> None:
        """A rank that the run did not have goes on with the numbers that it began with."""
        states = [self._state["rng"], *self._state.get("rng of other ranks", [])]
        if rank < len(states):
            set_rng_state(states[rank])

    def rewind(self, directory: Path) -> None:
        """Remove the checkpoints in `directory` of steps that are taken again."""
        if directory.resolve() == self.path.parent.resolve():
            remove_checkpoints(_later(self.path))


def find_resumed(
    config: TrainConfig, ranks: Ranks, identity: Callable[[], dict[str, Any]], total_steps: int
) -> Resumed | None:
    """The run to go on with, if there is one; ConfigError if it is not this one.

    The first of the ranks looks for it; identity() is what this run must agree in.
    """
    path = _find_checkpoint(config) if ranks.first else None
    path = ranks.exchange(path)[0]
    if path is None:
        return None
    resumed = Resumed(path)
    resumed.check(identity())
    done = resumed.history.steps
    if done > total_steps:
        raise ConfigError(
            f"{path} cannot be resumed: it has taken {done} steps, and this run is to take "
            f"{total_steps}: raise max_steps or num_train_epochs"
        )
    return resumed


def _find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint that config.resume means; None: begin with the first step.

    ConfigError if there is none at a path that was given, or if output_dir has later ones than it
    which nobody said may go; FileFormatError if there are some and all are damaged.
    """
    output = Path(config.output_dir)
    if config.resume is None:
        return None
    if config.resume == "auto":
        try:
            return newest_checkpoint(output)
        except FileFormatError:
            if not config.overwrite_output_dir:
                raise
            return None
    path = Path(config.resume)
    if not (path / MANIFEST).is_file() and checkpoints(path):  # the output_dir of a run
        return newest_checkpoint(path)
    if not (path / MANIFEST).is_file():
        lacks = f"has no {MANIFEST}" if path.is_dir() else "is no directory"
        raise ConfigError(
            f"resume: expected 'auto' or a checkpoint's directory; got {path}, which {lacks}"
        )
    later = [p.name for p in _later(path)] if path.parent.resolve() == output.resolve() else []
    if later and not config.overwrite_output_dir:
        raise ConfigError(
            f"resume: {path} is not the newest: {', '.join(later)} would be made again: resume "
            "'auto', name another output_dir, or set overwrite_output_dir if they may go"
        )
    return path


def _later(path: Path) -> list[Path]:
    """The checkpoints beside this one that are of later steps."""
    step = step_of(path)
    found = checkpoints(path.parent)
    return [] if step is None else [p for p in found if (step_of(p) or 0) > step]
