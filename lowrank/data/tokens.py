"""Examples to token ids and labels: which tokens are learned, the end of text, truncation."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lowrank.data.examples import Examples
from lowrank.data.kinds import checked
from lowrank.data.segments import Segment, Tokenizer, segments
from lowrank.errors import DataError, LowrankError, MissingPackageError
from lowrank.progress import bar

IGNORED = -100  # the label of a token that is not learned, as in F.cross_entropy


@dataclass
class TokenizedExamples:
    """All examples end to end: example i is ids[offsets[i] : offsets[i + 1]].

    ids, labels: int32 [total]; the first label of each example is -100, since nothing precedes it.
    labelled[i] counts the tokens of example i that are learned; places[i] says where it came from.
    """

    ids: Tensor
    labels: Tensor
    offsets: list[int]
    labelled: list[int]
    truncated: int = 0
    dropped: int = 0
    notes: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labelled)

    def length(self, i: int) -> int:
        return self.offsets[i + 1] - self.offsets[i]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [end - start for start, end in pairwise(self.offsets)]

    def span(self, i: int) -> slice:
        """Where example i lies in ids and labels."""
        return slice(self.offsets[i], self.offsets[i + 1])

    def where(self, i: int) -> str:
        """`file:line` of example i, or its number where no place is known."""
        return self.places[i] if self.places else f"example {i}"

    @property
    def fingerprint(self) -> str:
        """sha256 of all ids, labels and borders: what a run that goes on must find unchanged."""
        digest = hashlib.sha256()
        for values in (self.ids, self.labels, torch.tensor(self.offsets)):
            digest.update(values.numpy())
        return digest.hexdigest()


def tokenize(
    example: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    max_length: int | None = None,
    completion_only_loss: bool = True,
    assistant_only_loss: bool | None = None,
) -> dict[str, list[int]]:
    """Turn one example into {"input_ids", "labels"}, two lists of one length, at most `max_length`.

    labels[s] is input_ids[s], or -100 where it is not learned: the prompt of a completion unless
    `completion_only_loss` is false, and the turns of messages that the assistant did not write
    unless `assistant_only_loss`, which follows the other if None, is. `text` and completions end in
    EOS. A prompt's ids are those it has alone, as when generating.
    """
    kind, example = checked(example, "the example")
    ids, labels, _ = _tokenize(
        example, kind, tokenizer, completion_only_loss, assistant_only_loss, begin_of(tokenizer)
    )
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def tokenize_all(
    examples: Examples,
    tokenizer: Tokenizer | None,
    max_length: int | None = None,
    completion_only_loss: bool = True,
    assistant_only_loss: bool | None = None,
    vocab_size: int | None = None,
    disable_tqdm: bool = False,
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
    offsets, labelled, places = [0], [], []
    seen: Counter[str] = Counter()
    begin = begin_of(tokenizer)
    for i, example in enumerate(bar("tokenizing", examples, len(examples), disable_tqdm)):
        try:
            ids, labels, turns = _tokenize(
                example,
                examples.kind,
                tokenizer,
                completion_only_loss,
                assistant_only_loss,
                begin,
            )
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
            ids, labels = ids[:max_length], labels[:max_length]
            seen["truncated"] += 1
        labels[:1] = [IGNORED] * len(labels[:1])
        learned = len(labels) - labels.count(IGNORED)
        seen["empty"] += not example.get("completion", example.get("output", True))
        if not learned:
            seen["dropped"] += 1
            continue
        seen[turns] += 1
        all_ids.extend(ids)
        all_labels.extend(labels)
        offsets.append(len(all_ids))
        labelled.append(learned)
        places.append(examples.where(i))
    notes = _notes(len(examples), max_length, seen)
    if not labelled:
        raise DataError(
            f"{examples.where(0)} and all after it: no token is left to learn: {'; '.join(notes)}"
        )
    flat = [torch.frombuffer(values, dtype=torch.int32) for values in (all_ids, all_labels)]
    counts = (seen["truncated"], seen["dropped"])
    return TokenizedExamples(flat[0], flat[1], offsets, labelled, *counts, notes, places)


def _notes(total: int, max_length: int | None, seen: Counter[str]) -> list[str]:
    said = {
        "truncated": f"examples were cut to max_length={max_length} tokens",
        "dropped": f"examples have no token to learn within max_length={max_length} and were "
        "dropped",
        "empty": "completions are empty: at most the end token is learned from them",
        "unknown": "conversations are learned whole: the chat template does not show where the "
        "assistant's turns begin and end",
        "some": "conversations have turns of the assistant that the chat template shows otherwise "
        "once they are past: those turns are not learned",
    }
    return [f"{seen[what]} of {total} {text}" for what, text in said.items() if seen[what]]


def begin_of(tokenizer: Tokenizer | None) -> list[int]:
    """The tokens that the tokenizer puts before any text: its BOS, or none."""
    bos = tokenizer.bos_token_id if tokenizer is not None else None
    if bos is None or tokenizer.encode("", add_special_tokens=True)[:1] != [bos]:
        return []
    return [bos]


def _tokenize(
    example: Mapping[str, Any],
    kind: str,
    tokenizer: Tokenizer | None,
    completion_only: bool,
    assistant_only: bool | None,
    begin: list[int],
) -> tuple[list[int], list[int], str]:
    """ids, labels, and which of the assistant's turns are learned: "all", "some" or "unknown"."""
    if kind == "tokens":
        ids = example["input_ids"]
        return list(ids), list(example.get("labels", ids)), "all"
    if tokenizer is None:
        raise DataError(f"an example of kind '{kind}' needs a tokenizer; got None")
    found = segments(example, kind, tokenizer, completion_only, assistant_only)
    ids, labels = _encode(found.parts, tokenizer)
    if not found.rendered:
        eos = tokenizer.eos_token_id
        if ids[:1] != begin:
            ids, labels = [*begin, *ids], [*[IGNORED] * len(begin), *labels]
        if eos is not None and ids[-1:] != [eos]:
            ids, labels = [*ids, eos], [*labels, eos]
    return ids, labels, found.turns


def _encode(parts: Sequence[Segment], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of the parts' joined text, and labels from whether each part is learned.

    The text is encoded whole where every border between parts falls between two of its tokens, and
    part by part otherwise: either way a prompt's ids are those it has alone.
    """
    parts = [(text, learned) for text, learned in parts if text]
    apart = [tokenizer.encode(text, add_special_tokens=False) for text, _ in parts]
    if len(parts) < 2:
        return _labelled(apart, parts)
    whole = tokenizer.encode("".join(text for text, _ in parts), add_special_tokens=False)
    if whole != [token for ids in apart for token in ids]:
        # some tokenizers begin a text otherwise than they go on in it
        borders, before = [0], ""
        for text, _ in parts[:-1]:
            before += text
            ids = tokenizer.encode(before, add_special_tokens=False)
            if whole[: len(ids)] != ids:
                break
            borders.append(len(ids))
        else:
            borders.append(len(whole))
            apart = [whole[start:end] for start, end in pairwise(borders)]
    return _labelled(apart, parts)


def _labelled(ids: list[list[int]], parts: Sequence[Segment]) -> tuple[list[int], list[int]]:
    every = [token for part in ids for token in part]
    labels: list[int] = []
    for part, (_, learned) in zip(ids, parts, strict=True):
        labels.extend(part if learned else [IGNORED] * len(part))
    return every, labels
