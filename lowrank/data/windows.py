"""A long text cut into windows of tokens, each an example that a model sees at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank.data.tokens import IGNORED, TokenizedExamples
from lowrank.errors import ConfigError, DataError


def windows(
    ids: Sequence[int] | Tensor,
    begin: Sequence[int] = (),
    max_length: int = 1024,
    stride: int | None = None,
) -> TokenizedExamples:
    """Windows of at most `max_length` tokens, of which each begins with `begin`, a BOS for one.

    A window starts every `stride` tokens of the text, None: where the one before it ends. Each
    token of the text is predicted once, by the first window that has it, but for the first of a
    window that has nothing before it. DataError if none is left to predict.
    """
    room = max_length - len(begin)
    if room < 2:
        raise ConfigError(
            f"max_length: expected at least {len(begin) + 2}, for two tokens of the text; "
            f"got {max_length}"
        )
    stride = room if stride is None else stride
    if not 1 <= stride <= room:
        raise ConfigError(
            f"stride: expected 1 to {room}, the tokens of a window, so that none is left out; "
            f"got {stride}"
        )
    text, first = (torch.as_tensor(given, dtype=torch.int32) for given in (ids, begin))
    parts, labels, offsets, labelled, done = [], [], [0], [], 0
    for start in range(0, len(text), stride):
        stop = min(start + room, len(text))
        part = torch.cat([first, text[start:stop]])
        label = part.clone()
        label[: max(1, len(first) + done - start)] = IGNORED
        new = int((label != IGNORED).sum())
        if new:
            parts.append(part)
            labels.append(label)
            offsets.append(offsets[-1] + len(part))
            labelled.append(new)
        done = stop
        if stop == len(text):
            break
    if not parts:
        raise DataError(f"text: expected at least two tokens, one to predict; got {len(text)}")
    return TokenizedExamples(torch.cat(parts), torch.cat(labels), offsets, labelled)
