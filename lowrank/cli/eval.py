"""Measure a model on held-out text or examples, with an adapter, without, or both.

  lowrank eval --model HuggingFaceTB/SmolLM2-135M-Instruct --quantizer nf4 --text text.txt
  lowrank eval --model HuggingFaceTB/SmolLM2-135M-Instruct --data held_out.jsonl --exact-match
  lowrank eval --config out/run.toml

Of a text, the perplexity; of examples, the loss of what training would learn from them, and with
--exact-match how many the model answers as they say, greedily. The third measures what a training
came to: the adapter in its directory, on its eval_data, with its settings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from lowrank.cli.measure import HeldOut, table
from lowrank.cli.options import add_config, add_fields, make, tables_of
from lowrank.cli.output import show
from lowrank.cli.source import Run, Source, source_of
from lowrank.data import TokenizedExamples
from lowrank.data.tokens import IGNORED
from lowrank.errors import ConfigError, DataError
from lowrank.models.decoder import Decoder
from lowrank.models.generate import generate_ids
from lowrank.models.tokenizer import Tokenizer
from lowrank.progress import bar
from lowrank.train import TrainConfig

_ROOM = 16  # tokens beyond the longest answer, for one that is spelled in more
_SHOWN = 3  # wrong answers


@dataclass(kw_only=True)
class Evaluation(HeldOut):
    __doc__ = f"""{HeldOut.__doc__}
    adapter: the adapter to measure; with a training's run.toml, the one in its output_dir.
    with_adapter: measure with the adapter on, off, or both.
    exact_match: have the model answer the examples too, and count the answers that are theirs.
    max_new_tokens: of an answer, at most; none: a few more than the longest that is expected.
    """

    adapter: str | None = None
    with_adapter: Literal["on", "off", "both"] = "both"
    exact_match: bool = False
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is None and self.data is None:
            raise ConfigError("text or data is needed: pass --text or --data")
        if self.adapter is None and self.with_adapter == "on":
            raise ConfigError("with_adapter: on needs an adapter; got none: pass --adapter")
        if self.exact_match and self.data is None:
            raise ConfigError("exact_match: needs examples with answers: pass --data")
        if self.max_new_tokens is not None and not self.exact_match:
            raise ConfigError(
                f"max_new_tokens: belongs to exact_match; got {self.max_new_tokens} without: "
                "pass --exact-match"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_fields(parser, Evaluation, "eval", "what is measured: [eval] in a TOML file")
    add_fields(parser, Source, "run", "the model: [run] in a TOML file, as run.toml of a training")


def run(args: argparse.Namespace) -> int:
    source, settings = resolve(args)
    model, tokenizer = source.load(), source.load_tokenizer()
    sets = settings.tokenized(model, tokenizer)
    asked = answers(sets[settings.data], tokenizer) if settings.exact_match else []
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    lines: list[str] = []

    def measure(name: str) -> None:
        found = measured[name] = settings.measure(model, sets)
        if asked:
            written = answered(model, tokenizer, asked, settings)
            wrong = [pair for pair in zip(asked, written, strict=True) if pair[0].text != pair[1]]
            share = 1 - len(wrong) / len(asked)
            found[settings.data] |= {"exact_match": share, "examples": len(asked)}
            lines[:] = [
                f"{name}, {answer.where}: expected {answer.text!r}; got {text!r}"
                for answer, text in wrong[:_SHOWN]
            ]

    # before the adapter is there: one that began with a part of the weights changes the base too
    if settings.adapter is None or settings.with_adapter != "on":
        measure("base")
    if settings.adapter is not None and settings.with_adapter != "off":
        source.load_adapter(model, settings.adapter)
        measure("adapter")
    about = {"model": source.model, "adapter": settings.adapter}
    show(args, "\n".join([table(measured), *lines]), {**about, "measured": measured})
    return 0


def resolve(args: argparse.Namespace) -> tuple[Source, Evaluation]:
    """The settings of the flags, over [eval] of the file, over what a training there was told."""
    tables = tables_of(args, {"run": Run, "train": TrainConfig, "eval": Evaluation})
    run, trained = tables["run"], tables["train"]
    own = {field.name for field in fields(Evaluation)}
    found = {name: value for name, value in trained.items() if name in own}
    if "output_dir" in trained:
        found["adapter"] = str(trained["output_dir"])
    found |= tables["eval"]
    if "eval_data" in run and ("text" not in found or found.get("exact_match")):
        found.setdefault("data", run["eval_data"])
    return source_of(run), make(Evaluation, found)


@dataclass(frozen=True)
class Answer:
    """What one example asks, as tokens, and the text that is expected."""

    prompt: list[int]
    tokens: int
    text: str
    where: str


def answers(data: TokenizedExamples, tokenizer: Tokenizer) -> list[Answer]:
    """The last stretch of each example that is learned, and all that is before it."""
    found = []
    for i in range(len(data)):
        ids, labels = data.ids[data.span(i)].tolist(), data.labels[data.span(i)].tolist()
        stop = len(ids) - next(k for k, label in enumerate(reversed(labels)) if label != IGNORED)
        start = stop
        while labels[start - 1] != IGNORED:
            start -= 1
        if start == 1:  # the first token never is
            raise DataError(
                f"{data.where(i)}: exact_match needs a prompt before the answer; got none: it is "
                "learned whole"
            )
        text = tokenizer.decode(ids[start:stop]).strip()
        found.append(Answer(ids[:start], stop - start, text, data.where(i)))
    return found


def answered(
    model: Decoder, tokenizer: Tokenizer, asked: Sequence[Answer], settings: Evaluation
) -> list[str]:
    """What the model answers, greedily, up to its end token."""
    longest = max(answer.tokens for answer in asked)
    most = longest + _ROOM if settings.max_new_tokens is None else settings.max_new_tokens
    ends = {*model.config.eos_token_ids, tokenizer.eos_token_id} - {None}
    size = settings.per_device_eval_batch_size
    # those of a batch are padded to the longest
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt))
    texts = [""] * len(asked)
    for start in bar("answering", range(0, len(order), size)):
        rows = order[start : start + size]
        written = generate_ids(model, [asked[i].prompt for i in rows], most, ends=ends)
        for i, ids in zip(rows, written, strict=True):
            texts[i] = tokenizer.decode(ids).strip()
    return texts
