"""Signals as a wish: the first is noted, for the loop to act on; the second interrupts at once."""

from __future__ import annotations

import signal
import threading

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """A context in which the first SIGINT (Ctrl-C) or SIGTERM only sets `requested`.

    SIGTERM is how schedulers and containers end a process, with some time to save. The second of
    them raises KeyboardInterrupt. Only the main thread is given signals; in any other this does
    nothing.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interrupt:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        if self._main:
            for number, previous in self._previous.items():
                # None: the previous handler was not set from Python
                signal.signal(number, previous if previous is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
