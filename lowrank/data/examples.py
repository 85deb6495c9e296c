"""Training examples from a file or a sequence; what is wrong is refused with its file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from lowrank.errors import DataError

# kind -> the fields an example of that kind must have
KINDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "tokens": ("input_ids",),
}
FIELDS = "'text', 'prompt' and 'completion', 'messages', or 'input_ids'"


@dataclass(frozen=True)
class Examples(Sequence[dict[str, Any]]):
    """Validated examples, all of one kind; `where(i)` says where example i came from."""

    kind: str
    rows: list[dict[str, Any]]
    places: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, i: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return self.rows[i]

    def where(self, i: int) -> str:
        """`file:line` of example i, or `example i` of a sequence."""
        return self.places[i]


def load_examples(source: str | Path | Sequence[Mapping[str, Any]]) -> Examples:
    """Read examples from JSON lines (`.gz` too), a file with one JSON list, or a sequence of dicts.

    An example has `text`; `prompt` and `completion`; `messages` ([{"role", "content"}], optionally
    with `tools`); or `input_ids` (optionally with `labels`, -100 where no loss is wanted). Other
    fields are ignored. All are of one kind. Raises DataError with the place of what is wrong.
    """
    if isinstance(source, Examples):
        return source
    if isinstance(source, str | Path):
        name, found = str(source), _read_file(Path(source))
    elif isinstance(source, Mapping) or not (
        hasattr(source, "__len__") and hasattr(source, "__getitem__")
    ):
        got = type(source).__name__
        raise DataError(f"data must be a path or a sequence of dicts; got {got}: pass a list")
    else:
        name = "the data"
        found = ((f"example {i}", source[i]) for i in range(len(source)))
    kind, rows, places = "", [], []
    for place, row in found:
        kind = _check(row, place, kind)
        rows.append(dict(row))
        places.append(place)
    if not rows:
        raise DataError(f"{name}: expected at least one example; got none: the data set is empty")
    return Examples(kind, rows, places)


def kind_of(row: Mapping[str, Any], place: str) -> str:
    """The kind whose fields `row` has; DataError if it has those of none, or of more than one."""
    kinds = [kind for kind, fields in KINDS.items() if all(field in row for field in fields)]
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        fields = " and ".join(f"'{KINDS[kind][0]}'" for kind in kinds)
        raise DataError(
            f"{place}: has fields of {len(kinds)} kinds of example, {fields}: keep one of them"
        )
    for have, lack in (("prompt", "completion"), ("completion", "prompt")):
        if have in row:
            raise DataError(f"{place}: has '{have}' but lacks the field '{lack}'")
    got = ", ".join(f"'{key}'" for key in list(row)[:6]) or "no fields"
    raise DataError(f"{place}: lacks a field to train on: expected {FIELDS}; got {got}")


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) for each example of JSON lines or of one JSON list."""
    raw = _read_bytes(path)
    if raw.lstrip()[:1] == b"[":
        for i, row in enumerate(_parse(raw, path, 1)):
            yield f"{path}: item {i}", row
        return
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, path, number)


def _read_bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:  # a directory, no permission, a bad gzip member
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip data is truncated or damaged: {error}") from None
    return raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark


def _parse(raw: bytes, path: Path, line: int) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{line + error.lineno - 1}: not JSON: {error.msg} at column {error.colno}"
        ) from None
    except UnicodeDecodeError as error:
        line += raw[: error.start].count(b"\n")
        raise DataError(
            f"{path}:{line}: not UTF-8: {error.reason} at byte {error.start} of it"
        ) from None
    except RecursionError:
        raise DataError(f"{path}:{line}: JSON nested too deeply to read") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path}:{line}: cannot be read: {error}") from None


def _check(row: Any, place: str, kind: str) -> str:
    """Validate one example against the kind of the first; returns that kind."""
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: expected a JSON object with {FIELDS}; got {type(row).__name__}")
    found = kind_of(row, place)
    if kind and found != kind:
        raise DataError(
            f"{place}: is of kind '{found}', those before are '{kind}': split the data by kind"
        )
    if found == "messages":
        _check_messages(row, place)
    elif found == "tokens":
        _check_tokens(row, place)
    else:
        for field in KINDS[found]:
            _check_text(row[field], f"'{field}'", place)
    return found


def _check_text(value: Any, what: str, place: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{place}: {what} must be text; got {type(value).__name__} ({value!r:.40})")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: {what} has a lone surrogate, which no tokenizer reads: remove it"
        ) from None


def _check_messages(row: Mapping[str, Any], place: str) -> None:
    messages = row["messages"]
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise DataError(
            f"{place}: 'messages' must be a list of objects; got {type(messages).__name__}"
        )
    if not messages:
        raise DataError(f"{place}: 'messages' is empty: expected at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(
                f"{place}: messages[{i}] must be an object; got {type(message).__name__}"
            )
        if "role" not in message:
            raise DataError(f"{place}: messages[{i}] lacks the field 'role'")
        _check_text(message["role"], f"messages[{i}]['role']", place)
        # a turn that only calls a tool has no content
        if message.get("content") is None and not message.get("tool_calls"):
            raise DataError(f"{place}: messages[{i}] lacks the field 'content'")
        if message.get("content") is not None:
            _check_text(message["content"], f"messages[{i}]['content']", place)


def _check_tokens(row: Mapping[str, Any], place: str) -> None:
    lengths = {}
    for field in ("input_ids", "labels"):
        if field not in row:
            continue
        values = row[field].tolist() if hasattr(row[field], "tolist") else row[field]
        if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
            raise DataError(
                f"{place}: '{field}' must be a list of whole numbers; got {values!r:.40}"
            )
        low = 0 if field == "input_ids" else -100
        if any(not low <= value < 2**31 for value in values):
            raise DataError(
                f"{place}: '{field}' must lie from {low} to 2**31 - 1; "
                f"got {min(values)} to {max(values)}"
            )
        lengths[field] = len(values)
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"{place}: 'labels' must be as many as 'input_ids', {lengths['input_ids']}; "
            f"got {lengths['labels']}"
        )
