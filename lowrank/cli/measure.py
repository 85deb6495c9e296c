"""Held-out text and examples, and a model's loss on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.cli.options import check_types
from lowrank.cli.output import columns
from lowrank.data import TokenizedExamples, load_examples, windows
from lowrank.data.tokens import begin_of
from lowrank.errors import ConfigError, DataError
from lowrank.models.tokenizer import Tokenizer
from lowrank.report.perplexity import token_ids
from lowrank.report.result import perplexity_of
from lowrank.train import TrainConfig, held_out_loss
from lowrank.train.dataset import model_number, tokenized


@dataclass(kw_only=True)
class HeldOut:
    """What a model is measured on.

    text: a file of plain text in UTF-8, for its perplexity.
    data: held-out examples, as those of training, for the loss of what is learned from them.
    tokens: of the text to read, at most.
    max_length: tokens of a window of the text, or of an example; the model's positions, if fewer.
    stride: tokens of the text from window to window; none: they lie side by side.
    per_device_eval_batch_size: windows or examples in one forward.
    completion_only_loss: measure completions and the assistant's turns only; otherwise all tokens.
    assistant_only_loss: the same for conversations alone; none: as completion_only_loss.
    dataset_text_field: the field that holds the text of an example, where it is not "text".
    """

    text: str | None = None
    data: str | None = None
    tokens: int | None = None
    max_length: int = 1024
    stride: int | None = None
    per_device_eval_batch_size: int = 8
    completion_only_loss: bool = True
    assistant_only_loss: bool | None = None
    dataset_text_field: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("tokens", 2), ("stride", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: expected at least {least}; got {value}")
            if value is not None and self.text is None:
                raise ConfigError(f"{name}: belongs to a text; got {value} without: pass --text")
        # before a model is loaded
        self.content = "" if self.text is None else read_text(self.text)
        self.examples = (
            [] if self.data is None else load_examples(self.data, self.dataset_text_field)
        )
        self.train_config = TrainConfig(
            "unused",
            max_length=self.max_length,
            per_device_eval_batch_size=self.per_device_eval_batch_size,
            completion_only_loss=self.completion_only_loss,
            assistant_only_loss=self.assistant_only_loss,
            dataset_text_field=self.dataset_text_field,
        )

    def tokenized(self, model: nn.Module, tokenizer: Tokenizer) -> dict[str, TokenizedExamples]:
        """{file: its windows or examples} for this model."""
        found = {}
        if self.text is not None:
            vocabulary = model_number(model, "vocab_size")
            limit = 2**62 if self.tokens is None else self.tokens
            try:
                ids = token_ids(self.content, tokenizer, limit, vocabulary)
            except DataError as error:
                raise DataError(f"{self.text}: {error}") from error
            context = model_number(model, "max_position_embeddings") or self.max_length
            length = min(self.max_length, context)
            found[self.text] = windows(ids, begin_of(tokenizer), length, self.stride)
        if self.data is not None:
            made = (self.train_config, tokenizer, model)
            found[self.data] = tokenized(self.examples, "held-out", *made)
        return found

    def measure(
        self, model: nn.Module, sets: Mapping[str, TokenizedExamples]
    ) -> dict[str, dict[str, Any]]:
        """{file: loss, a token in nats, perplexity, and the tokens that were predicted}."""
        found = {}
        for file, data in sets.items():
            loss = held_out_loss(model, data, self.per_device_eval_batch_size)
            tokens = sum(data.labelled)
            found[file] = {"loss": loss, "perplexity": perplexity_of(loss), "tokens": tokens}
        return found


def read_text(path: str) -> str:
    """The text of a file in UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8; {error.reason} at byte {error.start}") from None


def table(measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """{model: {file: numbers}} as text, the files one after the other."""
    rows = [["", "", "loss", "perplexity", "exact match"]]
    for file in next(iter(measured.values())):
        for model, of_model in measured.items():
            found = of_model[file]
            exact = ""
            if "exact_match" in found:
                exact = f"{found['exact_match']:.1%} of {found['examples']}"
            loss, perplexity = f"{found['loss']:.4f}", f"{found['perplexity']:.4g}"
            rows.append([file, model, loss, perplexity, exact])
    return columns(rows if any(row[-1] for row in rows[1:]) else [row[:-1] for row in rows])
