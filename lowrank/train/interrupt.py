"""Ctrl-C as a wish: the first is noted, for the loop to act on; the second interrupts at once."""

from __future__ import annotations

import signal
import threading


class Interrupt:
    """A context in which the first SIGINT sets `requested` instead of raising KeyboardInterrupt.

    Only the main thread is given signals; in any other this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interrupt:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._main:
            # None: the previous handler was not set from Python
            signal.signal(
                signal.SIGINT, self._previous if self._previous is not None else signal.SIG_DFL
            )

    def _note(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
