"""What a run calls at its stations, for those who want to watch it or to end it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowrank.train.loop import Loop


class Callback:
    """Override what you need; `loop` has model, config, history, update, and stop().

    An exception ends the run, as one of the loop's own does.
    """

    def on_train_begin(self, loop: Loop) -> None:
        """Before the first step, or the first after a checkpoint."""

    def on_evaluate(self, loop: Loop) -> None:
        """The held-out loss is the last of loop.history.eval_losses."""

    def on_step_end(self, loop: Loop) -> None:
        """A step is over, counted, and evaluated if that was due."""

    def on_train_end(self, loop: Loop) -> None:
        """After the last step, also if the run was stopped or interrupted before it."""


class Callbacks(Callback):
    """Several callbacks as one, called in their order."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._all = list(callbacks)

    def on_train_begin(self, loop: Loop) -> None:
        for callback in self._all:
            callback.on_train_begin(loop)

    def on_evaluate(self, loop: Loop) -> None:
        for callback in self._all:
            callback.on_evaluate(loop)

    def on_step_end(self, loop: Loop) -> None:
        for callback in self._all:
            callback.on_step_end(loop)

    def on_train_end(self, loop: Loop) -> None:
        for callback in self._all:
            callback.on_train_end(loop)
