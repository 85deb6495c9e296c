"""From what a caller passes as data to tokens, made once and kept for the next run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.data import Examples, TokenizedExamples, load_examples, tokenize_all
from lowrank.data.examples import Formatting
from lowrank.data.segments import Tokenizer
from lowrank.errors import ConfigError
from lowrank.io.token_cache import (
    load_tokens,
    save_tokens,
    token_cache_directory,
    token_cache_path,
)
from lowrank.train.config import TrainConfig

logger = logging.getLogger("lowrank.train")

Data = str | Path | Sequence[Mapping[str, Any]] | TokenizedExamples

_WORTH_KEEPING = 2.0  # seconds: what is tokenized faster is not written to the user's cache


@contextmanager
def template_kept(tokenizer: Tokenizer | None) -> Iterator[None]:
    """If what is inside fails, the tokenizer has the chat template again that it has now."""
    nothing = object()
    before = getattr(tokenizer, "chat_template", nothing)
    try:
        yield
    except BaseException:
        if before is nothing and hasattr(tokenizer, "chat_template"):
            del tokenizer.chat_template
        elif getattr(tokenizer, "chat_template", nothing) != before:
            tokenizer.chat_template = before  # type: ignore[union-attr]
        raise


def take_template(tokenizer: Tokenizer | None, path: str | Path) -> None:
    """Make the Jinja template in the file, or in the directory, the tokenizer's own."""
    if tokenizer is None:
        raise ConfigError("chat_template_path is for a tokenizer; got none: pass tokenizer=")
    path = Path(path)
    file = path / "chat_template.jinja" if path.is_dir() else path
    try:
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"chat_template_path: {file} is not UTF-8: {error}") from error
    except OSError as error:
        raise ConfigError(
            "chat_template_path: expected a Jinja file, or a directory with a "
            f"chat_template.jinja; got {file}: {error.strerror}"
        ) from error


def tokenized(
    data: Data,
    what: str,
    config: TrainConfig,
    tokenizer: Tokenizer | None,
    model: nn.Module,
    formatting_func: Formatting | None = None,
) -> TokenizedExamples:
    """The tokens of `data` for `model`, as the settings say; what was left out of them is logged.

    `what` names the data in the log. Tokens that were made before from the same examples by the
    same tokenizer with the same settings are read from config.token_cache.
    """
    if isinstance(data, TokenizedExamples):
        return data
    examples = load_examples(data, config.dataset_text_field, formatting_func)
    context = model_number(model, "max_position_embeddings")
    options = {
        "max_length": config.max_length if context is None else min(config.max_length, context),
        "completion_only_loss": config.completion_only_loss,
        "assistant_only_loss": config.assistant_only_loss,
        "vocab_size": model_number(model, "vocab_size"),
    }
    path = _cache_path(config, examples, tokenizer, options)
    found = None if path is None else load_tokens(path, examples)
    if found is None:
        begin = time.perf_counter()
        found = tokenize_all(examples, tokenizer, **options, disable_tqdm=config.disable_tqdm)
        took = time.perf_counter() - begin
        if path is not None and (not _is_auto(config) or took > _WORTH_KEEPING):
            save_tokens(path, found, examples)
    dated = "strftime_now" in (getattr(tokenizer, "chat_template", None) or "")
    if dated and examples.kind in ("messages", "instruction"):
        logger.warning(
            "%s data: the chat template writes today's date into every conversation: the data of a "
            "run that goes on tomorrow are others, unless token_cache keeps these",
            what,
        )
    for note in found.notes:
        logger.warning("%s data: %s", what, note)
    if found.truncated and context is not None and context < config.max_length:
        logger.warning(
            "%s data: the model was trained for %d tokens, fewer than max_length=%d",
            what,
            context,
            config.max_length,
        )
    return found


def model_number(model: nn.Module, name: str) -> int | None:
    """A whole number of the model's configuration; None if it does not say."""
    value = getattr(getattr(model, "config", None), name, None)
    return value if isinstance(value, int) else None


def padding_token(tokenizer: Tokenizer | None, model: nn.Module) -> int:
    """What rows are padded with, where attention is masked: the tokenizer's, or any."""
    pad, words = getattr(tokenizer, "pad_token_id", None), model_number(model, "vocab_size")
    # one that was added to the tokenizer alone is no row of the embedding
    return 0 if pad is None or (words is not None and pad >= words) else pad


def _cache_path(
    config: TrainConfig,
    examples: Examples,
    tokenizer: Tokenizer | None,
    options: dict[str, Any],
) -> Path | None:
    """Where these tokens would be kept; None if they are not to be, or cannot be told apart."""
    fingerprint = getattr(tokenizer, "fingerprint", None)
    directory = token_cache_directory() if _is_auto(config) else config.token_cache
    if fingerprint is None or directory is None:
        return None
    contents = {"examples": examples.fingerprint, "tokenizer": fingerprint}
    return token_cache_path(directory, **contents, **options)


def _is_auto(config: TrainConfig) -> bool:
    return str(config.token_cache) == "auto"
