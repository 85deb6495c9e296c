"""What an example may be: its fields, checked, in one form for each kind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.errors import DataError

# kind -> the fields an example of that kind must have
KINDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "tokens": ("input_ids",),
}
FIELDS = "'text', 'prompt' and 'completion', 'instruction' and 'output', 'messages', or 'input_ids'"
_ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT's files name them


def kind_of(row: Mapping[str, Any], place: str) -> str:
    """The kind whose fields `row` has; DataError if it has those of none, or of more than one."""
    # in a table every row has every column: a field that is None is not there
    there = [key for key, value in row.items() if value is not None]
    for names in (there, list(row)):
        kinds = [kind for kind, fields in KINDS.items() if all(name in names for name in fields)]
        if len(kinds) == 1:
            return kinds[0]
        if kinds:
            fields = " and ".join(f"'{KINDS[kind][0]}'" for kind in kinds)
            raise DataError(
                f"{place}: has fields of {len(kinds)} kinds of example, {fields}: keep one of them"
            )
    for kind in ("completion", "instruction"):
        for have, lack in (KINDS[kind], KINDS[kind][::-1]):
            if have in row:
                raise DataError(f"{place}: has '{have}' but lacks the field '{lack}'")
    got = ", ".join(f"'{key}'" for key in list(row)[:6]) or "no fields"
    raise DataError(f"{place}: lacks a field to train on: expected {FIELDS}; got {got}")


def checked(row: Any, place: str) -> tuple[str, dict[str, Any]]:
    """The kind of an example, and the fields that matter to it, checked and in their one form.

    `conversations` become messages. DataError, which begins with `place`, for what is wrong.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: expected a JSON object with {FIELDS}; got {type(row).__name__}")
    kind = kind_of(row, place)
    if kind == "tokens":
        return kind, _tokens(row, place)
    if kind in ("messages", "conversations"):
        messages = _messages(row[kind], f"'{kind}'", place)
        tools = _tools(row.get("tools"), place)
        return "messages", {"messages": messages, **({"tools": tools} if tools else {})}
    if kind == "completion" and not any(isinstance(row[name], str) for name in KINDS[kind]):
        parts = {name: _messages(row[name], f"'{name}'", place) for name in KINDS[kind]}
        tools = _tools(row.get("tools"), place)
        return kind, {**parts, **({"tools": tools} if tools else {})}
    fields = {name: _text(row[name], f"'{name}'", place) for name in KINDS[kind]}
    if kind == "instruction" and row.get("input"):
        fields["input"] = _text(row["input"], "'input'", place)
    return kind, fields


def _text(value: Any, what: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {what} must be text; got {type(value).__name__} ({value!r:.40})")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{place}: {what} has a lone surrogate, which no tokenizer reads: remove it"
        ) from None
    return value


def _messages(messages: Any, what: str, place: str) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise DataError(f"{place}: {what} must be a list of objects; got {type(messages).__name__}")
    if not messages:
        raise DataError(f"{place}: {what} is empty: expected at least one message")
    name = what.strip("'")
    return [_message(message, f"{name}[{i}]", place) for i, message in enumerate(messages)]


def _message(message: Any, what: str, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"{place}: {what} must be an object; got {type(message).__name__}")
    if "from" in message and "role" not in message:  # ShareGPT
        role, content = message["from"], message.get("value")
        message = {"role": _ROLES.get(role, role), "content": content}
    if "role" not in message:
        raise DataError(f"{place}: {what} lacks the field 'role'")
    _text(message["role"], f"{what}['role']", place)
    # a turn that only calls a tool has no content
    if message.get("content") is None and not message.get("tool_calls"):
        raise DataError(f"{place}: {what} lacks the field 'content'")
    if message.get("content") is not None:
        _text(message["content"], f"{what}['content']", place)
    # templates ask whether a field is there; in a table every message has every field
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _tools(tools: Any, place: str) -> list[Any] | None:
    """The list, also of its JSON: a table has no other way to hold objects of different fields."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{place}: 'tools' is not JSON: {error}") from None
    if tools is not None and not (isinstance(tools, Sequence) and not isinstance(tools, str)):
        raise DataError(f"{place}: 'tools' must be a list of objects; got {type(tools).__name__}")
    return None if tools is None else list(tools)


def _tokens(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    found: dict[str, list[int]] = {}
    for field in ("input_ids", "labels"):
        if row.get(field) is None:
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
        found[field] = list(values)
    ids = found.get("input_ids")
    if ids is None:
        raise DataError(f"{place}: 'input_ids' must be a list of whole numbers; got None")
    if len(found.get("labels", ids)) != len(ids):
        raise DataError(
            f"{place}: 'labels' must be as many as 'input_ids', {len(ids)}; "
            f"got {len(found['labels'])}"
        )
    return found
