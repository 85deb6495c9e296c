"""Checkpoints of a run as it goes: copied between two steps, written beside the next ones."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lowrank.io.json_files import write_json
from lowrank.io.safetensors import write_safetensors
from lowrank.io.versions import versions
from lowrank.train.checkpoint import Writers, write_checkpoint
from lowrank.train.gradients import check_values
from lowrank.train.run import RunDirectory
from lowrank.train.sharding import gathered, wholes
from lowrank.train.state import rng_states, split
from lowrank.train.weights import weight_writers

if TYPE_CHECKING:
    from lowrank.train.loop import Loop

STATE, TENSORS = "state.json", "state.safetensors"


class Saver:
    """Saves checkpoints of a run into its directory, one at a time, in a thread of the first rank.

    identity: what the run must agree in with one that goes on with it; asked for in the thread.
    """

    def __init__(self, run: RunDirectory, identity: Callable[[], dict[str, Any]]) -> None:
        self._run, self._identity = run, identity
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, loop: Loop) -> None:
        """Copy the state of `loop`, which is between two steps, and begin to write it.

        Raises TrainingError if a weight is not finite, and what the one before ended with.
        """
        self.wait()
        check_values(loop.update.parameters, loop.history.steps, loop.ranks)
        devices = {p.device for p in loop.update.parameters.values()}
        rng, *others = rng_states(loop.ranks, devices)
        first = loop.ranks.first
        # what ranks have parts of, all of them put together
        best = None if loop.best is None else wholes(loop.best.state_dict(), first)
        update = wholes(loop.update.state_dict(), first)
        with gathered(loop.model, first):
            weights = weight_writers(loop.model) if first else {}
        if not first:
            return
        tensors: dict[str, Tensor] = {}
        state = split(
            {
                "step": loop.history.steps,
                "total_steps": loop.total_steps,
                "stopped": loop.stopped,
                "history": loop.history.to_dict(),
                "best": best,
                "callbacks": loop.callbacks.state_dict(),
                "rng": rng,
                "rng of other ranks": others,
                **update,
                "config": loop.config.to_dict(),
                "versions": versions(),
            },
            "",
            tensors,
        )
        arguments = (state, tensors, weights, loop.config.save_total_limit)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what the writing of a checkpoint ended with, if it ended badly."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when nothing is being written; raises as `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Return when nothing is being written, however that ended."""
        with contextlib.suppress(Exception):
            self.wait()

    def _write(
        self, state: Any, tensors: dict[str, Tensor], weights: Writers, limit: int | None
    ) -> None:
        def write_state(path: Path) -> None:
            write_json({**state, "identity": self._identity()}, path)

        try:
            self._run.sync()  # metrics.jsonl is to have every step that the checkpoint has
            writers = {
                **weights,
                TENSORS: lambda path: write_safetensors(path, tensors),
                STATE: write_state,
            }
            write_checkpoint(self._run.path, state["step"], writers, limit)
        except BaseException as error:  # raised again where the steps are taken
            self._error = error
