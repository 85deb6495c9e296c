"""How well a model predicts a text, as it is and with its linear layers quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.errors import ConfigError, DataError, ShapeError
from lowrank.surgery.inject import replace_modules

Span = tuple[int, int, int]  # start, first, stop: see `windows`


def token_ids(
    text: str | Sequence[int] | Tensor, tokenizer: Any, limit: int, vocabulary: int | None = None
) -> Tensor:
    """The first `limit` token ids of a text, or of ids, as int64 [T]; no special tokens are added.

    Raises DataError for fewer than two, of which nothing can be predicted, and for ids outside the
    `vocabulary`.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise ConfigError("tokenizer: expected one beside a text; or pass token ids as text")
        if not hasattr(tokenizer, "encode"):
            raise ConfigError(
                "tokenizer: expected one with encode(text, add_special_tokens); got "
                f"{type(tokenizer).__name__}"
            )
        text = tokenizer.encode(text, add_special_tokens=False)
    try:
        ids = torch.as_tensor(text)
    except (TypeError, ValueError, RuntimeError) as error:  # words, or rows of several lengths
        raise DataError(
            f"text: expected a string or token ids; got a {type(text).__name__}: {error}"
        ) from None
    if ids.dim() == 1 and len(ids) < 2:
        raise DataError(f"text: expected at least two tokens, one to predict; got {len(ids)}")
    if ids.is_floating_point() or ids.dim() != 1:
        raise DataError(
            f"text: expected at least two tokens, one to predict; got ids of {ids.dtype}, shape "
            f"{list(ids.shape)}"
        )
    ids = ids[:limit].long()
    least, most = ids.aminmax()
    if least < 0 or (vocabulary is not None and most >= vocabulary):
        last = "" if vocabulary is None else f" to {vocabulary - 1}"
        raise DataError(
            f"text: expected token ids from 0{last}; got {int(least)} to {int(most)}; "
            "was the text encoded with this model's tokenizer?"
        )
    return ids


def windows(count: int, window: int, stride: int) -> list[Span]:
    """(start, first, stop): tokens start to stop are read, and those from `first` on are predicted.

    A window begins every `stride` tokens. Each token but the text's first, and those that begin a
    window where windows do not overlap, is predicted once, by the first window that has it.
    """
    found, done = [], 1
    for start in range(0, count, stride):
        stop, first = min(start + window, count), max(done, start + 1)
        if first < stop:
            found.append((start, first, stop))
        done = stop
        if stop == count:
            break
    return found


@torch.no_grad()
def loss_per_token(
    model: nn.Module, ids: Tensor, spans: Sequence[Span], tick: Callable[[], None]
) -> float:
    """Mean of -log p(token | those before it in its window), in nats; the logits as float32.

    The model returns logits [1, S, V], or something with `.logits`. `tick` after each window.
    """
    total, count = 0.0, 0
    for start, first, stop in spans:
        part = ids[None, start:stop]
        out = model(part)
        logits = getattr(out, "logits", out)
        if not isinstance(logits, Tensor) or logits.shape[:2] != part.shape or logits.dim() != 3:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ShapeError(
                f"the model must return logits [B, S, V] (or .logits) for ids of "
                f"{list(part.shape)}; got {got}"
            )
        chosen = logits[0, first - start - 1 : stop - start - 1].float()
        total += F.cross_entropy(chosen, ids[first:stop], reduction="sum").item()
        count += stop - first
        tick()
    return total / count


@contextmanager
def swapped(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """The model with new[module] in the place of each module, and afterwards as it was."""
    try:
        replace_modules(model, dict(new))
        yield
    finally:
        replace_modules(model, {quantized: module for module, quantized in new.items()})
