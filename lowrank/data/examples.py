"""Training examples from a file or a sequence; what is wrong is refused with its file and line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from lowrank.data.kinds import checked
from lowrank.data.readers import read
from lowrank.errors import DataError

# a row of the data -> its text, or the fields of an example
Formatting = Callable[[Mapping[str, Any]], str | Mapping[str, Any]]


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

    @property
    def fingerprint(self) -> str:
        """sha256 of what the examples say, in their order, wherever they came from."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
        return digest.hexdigest()


def load_examples(
    source: str | Path | Sequence[Mapping[str, Any]],
    text_field: str | None = None,
    formatting_func: Formatting | None = None,
) -> Examples:
    """Read examples from JSON lines, a JSON list, CSV, TSV, Parquet, or a sequence of dicts.

    An example has `text`; `prompt` and `completion`, texts or lists of messages; `instruction`,
    `output` and perhaps `input`; `messages` ([{"role", "content"}]) or `conversations` ([{"from",
    "value"}]), perhaps with `tools`; or `input_ids`, perhaps with `labels`, -100 where no loss is
    wanted. Other fields are left out. All are of one kind. With `text_field`, an example is the
    text in that field; with `formatting_func`, it is what that returns of its row: text, or fields
    as above. Raises DataError with the place of what is wrong.
    """
    if isinstance(source, Examples):
        if formatting_func is not None:
            raise DataError("formatting_func takes rows as they are read; got Examples: pass it to "
                            "load_examples")  # fmt: skip
        return source
    kind, rows, places = "", [], []
    for place, row in read(source):
        if formatting_func is not None:
            row = _formatted(row, place, formatting_func)
        elif text_field is not None:
            row = _field(row, place, text_field)
        found, row = checked(row, place)
        if kind and found != kind:
            raise DataError(
                f"{place}: is of kind '{found}', those before are '{kind}': split the data by kind"
            )
        kind = found
        rows.append(row)
        places.append(place)
    if not rows:
        name = source if isinstance(source, str | Path) else "the data"
        raise DataError(f"{name}: expected at least one example; got none: the data set is empty")
    return Examples(kind, rows, places)


def _formatted(row: Any, place: str, formatting_func: Formatting) -> Mapping[str, Any]:
    try:
        made = formatting_func(row)
    except Exception as error:  # it is the caller's code, and may fail as any code does
        raise DataError(f"{place}: formatting_func fails: {error!r}") from error
    if isinstance(made, str):
        return {"text": made}
    if not isinstance(made, Mapping):
        raise DataError(
            f"{place}: formatting_func must return text, or a dict of an example's fields; got "
            f"{type(made).__name__}: it is called with one row"
        )
    return made


def _field(row: Any, place: str, name: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        return row  # `checked` refuses it
    if name not in row:
        got = ", ".join(f"'{key}'" for key in list(row)[:6]) or "no fields"
        raise DataError(f"{place}: lacks the field '{name}' of dataset_text_field; got {got}")
    return {"text": row[name]}
