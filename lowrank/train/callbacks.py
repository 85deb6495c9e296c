"""What a run calls at its stations, for those who want to watch it or to end it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lowrank.errors import ConfigError

if TYPE_CHECKING:
    from lowrank.train.loop import Loop


class Callback:
    """Override what you need; `loop` has model, config, history, update, and stop().

    An exception ends the run, as one of the loop's own does. What must outlive a kill goes through
    `state_dict`, of numbers, text, lists, dicts and tensors, into every checkpoint.
    """

    def on_train_begin(self, loop: Loop) -> None:
        """Before the first step, or the first after a checkpoint."""

    def on_evaluate(self, loop: Loop) -> None:
        """The held-out loss is the last of loop.history.eval_losses."""

    def on_step_end(self, loop: Loop) -> None:
        """A step is over, counted, and evaluated if that was due."""

    def on_train_end(self, loop: Loop) -> None:
        """After the last step, also if the run was stopped or interrupted before it."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` is given when a run goes on from a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Before on_train_begin of a run that goes on; not called if there was no such callback."""


def listed(callbacks: Iterable[Callback]) -> list[Callback]:
    """The callbacks as a list; ConfigError for what has not a Callback's methods."""
    found = list(callbacks) if isinstance(callbacks, Iterable) else None
    methods = [name for name in vars(Callback) if not name.startswith("_")]
    for callback in [callbacks] if found is None else found:
        has = not isinstance(callback, type) and all(hasattr(callback, name) for name in methods)
        if found is None or not has:
            raise ConfigError(
                "callbacks: expected a list of objects of classes derived from Callback; got "
                f"{callback!r:.80}"
            )
    return found or []


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

    def state_dict(self) -> dict[str, Any]:
        return {name: callback.state_dict() for name, callback in self._named().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, callback in self._named().items():
            if name in state:
                callback.load_state_dict(state[name])

    def _named(self) -> dict[str, Callback]:
        """Each by its class, and its number among those of that class."""
        found: dict[str, Callback] = {}
        for callback in self._all:
            name = type(callback).__name__
            number = sum(n.partition(" ")[0] == name for n in found)
            found[f"{name} {number}"] = callback
        return found
