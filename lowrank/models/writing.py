"""What a model writes after one prompt: tokens to text as they come, up to where it ends."""

from __future__ import annotations

from collections.abc import Sequence, Set

from lowrank.models.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # what bytes are decoded to that are no whole character


class Writing:
    """The text of the tokens so far, in pieces that are certain when they are given out.

    It ends before an end token, before the `stop` string that is complete first, or with `most`
    tokens. A character of several tokens is given out when it is whole, and what may be the
    beginning of a stop string when it turned out not to be.
    """

    def __init__(
        self, tokenizer: Tokenizer, ends: Set[int], stop: Sequence[str], most: int
    ) -> None:
        self._tokenizer, self._ends, self._stop, self._most = tokenizer, ends, stop, most
        self._ids: list[int] = []
        # ids from `_first` on are decoded together, those before `_read` a second time: what text a
        # token is may depend on the one before it
        self._first = self._read = 0
        self._held = ""  # certain but for the stop strings
        self.ended = False

    def add(self, token: int) -> str:
        """The text that became certain with this token; once `ended`, nothing comes any more."""
        if token in self._ends:
            return self._finish()
        self._ids.append(token)
        self._held += self._text(whole=True)
        if (at := self._stopped()) is not None:
            self.ended = True
            return self._held[:at]
        if len(self._ids) == self._most:
            return self._finish()
        certain = len(self._held) - max((_begun(self._held, s) for s in self._stop), default=0)
        piece, self._held = self._held[:certain], self._held[certain:]
        return piece

    def _finish(self) -> str:
        self.ended = True
        self._held += self._text(whole=False)
        return self._held[: self._stopped()]

    def _text(self, whole: bool) -> str:
        """What the tokens since the last time add, if it ends in a character that is `whole`."""
        before = self._tokenizer.decode(self._ids[self._first : self._read])
        now = self._tokenizer.decode(self._ids[self._first :])
        if now == before or (whole and now.endswith(_UNFINISHED)):
            return ""
        self._first, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _stopped(self) -> int | None:
        """Where the stop string begins that is complete first; of several, the longest."""
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        return min(found)[1] if found else None


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the first ones of `stop`, but not all of it."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
