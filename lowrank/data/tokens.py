"""Examples to token ids and labels: which tokens are learned, the end of text, truncation."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank.data.examples import Examples, kind_of
from lowrank.errors import DataError, LowrankError, MissingPackageError

IGNORED = -100  # the label of a token that is not learned, as in F.cross_entropy


class Tokenizer(Protocol):
    """What tokenization asks of a tokenizer; `apply_chat_template` only for messages."""

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def bos_token_id(self) -> int | None: ...

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = False,
        tools: list[Any] | None = None,
    ) -> str: ...


@dataclass
class TokenizedExamples:
    """All examples end to end: example i is ids[offsets[i] : offsets[i + 1]].

    ids, labels: int32 [total]; the first label of each example is -100, since nothing precedes it.
    labelled[i] counts the tokens of example i that are learned.
    """

    ids: Tensor
    labels: Tensor
    offsets: list[int]
    labelled: list[int]
    truncated: int = 0
    dropped: int = 0
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labelled)

    def length(self, i: int) -> int:
        return self.offsets[i + 1] - self.offsets[i]


def tokenize(
    example: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    max_length: int | None = None,
    completion_only_loss: bool = True,
) -> dict[str, list[int]]:
    """Turn one example into {"input_ids", "labels"}, two lists of one length, at most `max_length`.

    labels[s] is input_ids[s], or -100 where it is not learned: the prompt of a completion and the
    turns of messages that the assistant did not write, unless `completion_only_loss` is false.
    `text` and `completion` end in EOS. A prompt's ids are those it has alone, as when generating.
    """
    ids, labels, _ = _tokenize(
        example, kind_of(example, "the example"), tokenizer, completion_only_loss
    )
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def tokenize_all(
    examples: Examples,
    tokenizer: Tokenizer | None,
    max_length: int | None = None,
    completion_only_loss: bool = True,
    vocab_size: int | None = None,
) -> TokenizedExamples:
    """Tokenize every example once; those with nothing to learn are dropped and counted in `notes`.

    Raises DataError naming file and line where an example cannot be tokenized or has an id that a
    model of `vocab_size` words does not know, or if none is left.
    """
    if tokenizer is None and examples.kind != "tokens":
        raise DataError(
            f"examples of kind '{examples.kind}' need a tokenizer; got None: pass tokenizer="
        )
    all_ids, all_labels = array("i"), array("i")
    offsets, labelled = [0], []
    truncated = dropped = 0
    told_apart: Counter[str] = Counter()
    for i, example in enumerate(examples):
        try:
            ids, labels, turns = _tokenize(example, examples.kind, tokenizer, completion_only_loss)
        except MissingPackageError:
            raise
        except LowrankError as error:
            raise DataError(f"{examples.where(i)}: {error}") from error
        highest = max(max(ids, default=0), max(labels, default=0))
        if vocab_size is not None and highest >= vocab_size:
            raise DataError(
                f"{examples.where(i)}: expected token ids below the model's vocab_size={vocab_size}"
                f"; got {highest}: use the model's own tokenizer"
            )
        if max_length is not None and len(ids) > max_length:
            ids, labels, truncated = ids[:max_length], labels[:max_length], truncated + 1
        labels[:1] = [IGNORED] * len(labels[:1])
        learned = len(labels) - labels.count(IGNORED)
        if not learned:
            dropped += 1
            continue
        told_apart[turns] += 1
        all_ids.extend(ids)
        all_labels.extend(labels)
        offsets.append(len(all_ids))
        labelled.append(learned)
    notes = _notes(len(examples), max_length, truncated, dropped, told_apart)
    if not labelled:
        raise DataError(
            f"{examples.where(0)} and all after it: no token is left to learn: {'; '.join(notes)}"
        )
    flat = [torch.frombuffer(values, dtype=torch.int32) for values in (all_ids, all_labels)]
    return TokenizedExamples(flat[0], flat[1], offsets, labelled, truncated, dropped, notes)


def _notes(
    total: int, max_length: int | None, truncated: int, dropped: int, turns: Counter[str]
) -> list[str]:
    notes = []
    if truncated:
        notes.append(f"{truncated} of {total} examples were cut to max_length={max_length} tokens")
    if dropped:
        notes.append(
            f"{dropped} of {total} examples have no token to learn within max_length={max_length} "
            "and were dropped"
        )
    if turns["unknown"]:
        notes.append(
            f"{turns['unknown']} of {total} conversations are learned whole: the chat template "
            "does not show where the assistant's turns begin and end"
        )
    if turns["some"]:
        notes.append(
            f"{turns['some']} of {total} conversations have turns of the assistant that the chat "
            "template shows otherwise once they are past: those turns are not learned"
        )
    return notes


def _tokenize(
    example: Mapping[str, Any], kind: str, tokenizer: Tokenizer | None, completion_only: bool
) -> tuple[list[int], list[int], str]:
    """ids, labels, and which of the assistant's turns are learned: "all", "some" or "unknown"."""
    if kind == "tokens":
        ids = [int(token) for token in example["input_ids"]]
        return ids, [int(label) for label in example.get("labels", ids)], "all"
    if tokenizer is None:
        raise DataError(f"an example of kind '{kind}' needs a tokenizer; got None")
    if kind == "messages":
        segments = _turns(example, tokenizer, completion_only)
        if not any(learned for _, learned in segments):
            return *_encode([(text, True) for text, _ in segments], tokenizer), "unknown"
        found = sum(learned for _, learned in segments)
        said = sum(message["role"] == "assistant" for message in example["messages"])
        all_found = found == said or not completion_only
        return *_encode(segments, tokenizer), "all" if all_found else "some"
    if kind == "text":
        segments = [(example["text"], True)]
    else:
        segments = [(example["prompt"], not completion_only), (example["completion"], True)]
    ids, labels = _encode(segments, tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if (
        bos is not None
        and ids[:1] != [bos]
        and tokenizer.encode("", add_special_tokens=True)[:1] == [bos]
    ):
        ids, labels = [bos, *ids], [IGNORED, *labels]
    if eos is not None and ids[-1:] != [eos]:
        ids, labels = [*ids, eos], [*labels, eos]
    return ids, labels, "all"


def _encode(
    segments: Sequence[tuple[str, bool]], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """Token ids of the segments' joined text, and labels from each segment's `learned`.

    The text is encoded whole where every border between segments falls between two of its tokens,
    and segment by segment otherwise: either way a prompt's ids are those it has alone.
    """
    segments = [(text, learned) for text, learned in segments if text]
    if not segments:
        return [], []
    whole = tokenizer.encode("".join(text for text, _ in segments), add_special_tokens=False)
    borders, before = [0], ""
    for text, _ in segments[:-1]:
        before += text
        ids = tokenizer.encode(before, add_special_tokens=False)
        if whole[: len(ids)] != ids:
            break
        borders.append(len(ids))
    else:
        borders.append(len(whole))
        parts = [whole[start:end] for start, end in zip(borders, borders[1:], strict=False)]
        return whole, _labels(parts, segments)
    parts = [tokenizer.encode(text, add_special_tokens=False) for text, _ in segments]
    return [token for part in parts for token in part], _labels(parts, segments)


def _labels(parts: list[list[int]], segments: Sequence[tuple[str, bool]]) -> list[int]:
    labels: list[int] = []
    for part, (_, learned) in zip(parts, segments, strict=True):
        labels.extend(part if learned else [IGNORED] * len(part))
    return labels


def _turns(
    example: Mapping[str, Any], tokenizer: Tokenizer, completion_only: bool
) -> list[tuple[str, bool]]:
    """The rendered conversation cut into (text, learned): what the assistant wrote is learned.

    A turn's place is found by rendering the messages before it with the cue to answer, and those
    up to it: the whole conversation must begin with both. A turn that the template shows
    otherwise once it is past is not learned.
    """
    messages, tools = list(example["messages"]), example.get("tools")
    whole = _render(tokenizer, messages, False, tools)
    if not completion_only:
        return [(whole, True)]
    segments, done = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            cue = _render(tokenizer, messages[:i], True, tools)
            turn = _render(tokenizer, messages[: i + 1], False, tools)
        except MissingPackageError:
            raise
        except LowrankError:  # some templates refuse a conversation that stops there
            continue
        if done <= len(cue) < len(turn) and whole.startswith(cue) and whole.startswith(turn):
            segments += [(whole[done : len(cue)], False), (whole[len(cue) : len(turn)], True)]
            done = len(turn)
    return [*segments, (whole[done:], False)]


def _render(tokenizer: Tokenizer, messages: list[Any], cue: bool, tools: list[Any] | None) -> str:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=cue, tools=tools)
    if not isinstance(text, str):
        raise DataError(f"apply_chat_template must return text; got {type(text).__name__}")
    return text
