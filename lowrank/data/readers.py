"""Rows from JSON, CSV and Parquet files and from sequences, each with the place it came from."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank.errors import DataError, MissingPackageError

Found = Iterator[tuple[str, Any]]  # (place, row)


def read(source: Any) -> Found:
    """Yield (place, row) of a file, named by its ending, or of a sequence.

    `.csv` and `.tsv` have a header; `.parquet` needs pyarrow; anything else is JSON lines or one
    JSON list. All but Parquet may be gzipped. DataError for what cannot be read.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        names = path.name.lower().removesuffix(".gz")
        for ending, reader in _READERS.items():
            if names.endswith(ending):
                return reader(path)
        return _json(path)
    remedy = "pass a list"
    if isinstance(source, Mapping):  # a DatasetDict is one
        remedy = f"pass a list, or one part of it, such as data[{next(iter(source), None)!r}]"
    elif hasattr(source, "iloc"):
        remedy = "pass data.to_dict('records')"
    elif hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        remedy = ""
    elif hasattr(source, "__iter__"):
        remedy = "pass list(data)"
    if remedy:
        got = type(source).__name__
        raise DataError(f"data must be a path or a sequence of dicts; got {got}: {remedy}")
    # by iteration: that is many times faster than by index where rows are stored as columns
    return ((f"example {i}", row) for i, row in zip(range(len(source)), source, strict=False))


def _json(path: Path) -> Found:
    raw = _read_bytes(path)
    if raw.lstrip()[:1] == b"[":
        for i, row in enumerate(_parse(raw, path, 1)):
            yield f"{path}: item {i}", row
        return
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        if number == 1 and line.strip() == b"{":  # written to be read by people
            raise DataError(
                f"{path}:1: expected a whole object in each line, or one list of objects; got an "
                "object of several lines: write one a line"
            )
        yield f"{path}:{number}", _parse(line, path, number)


def _csv(path: Path) -> Found:
    raw = _read_bytes(path)
    lines = io.StringIO(_decode(raw, path, 1), newline="")
    delimiter = "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","
    limit = csv.field_size_limit(2**31 - 1)  # a cell of 128 KiB is an error otherwise
    try:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            line = rows.line_num + 1
            try:
                cells = next(rows, None)
            except csv.Error as error:
                raise DataError(f"{path}:{line}: not CSV: {error}") from None
            if cells is None:
                return
            if not cells:  # an empty line
                continue
            if not header:
                header = cells
                if len(set(header)) < len(header):
                    raise DataError(f"{path}:{line}: two columns have one name; got {header}")
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}:{line}: expected {len(header)} cells as in the header; "
                    f"got {len(cells)}"
                )
            yield f"{path}:{line}", dict(zip(header, cells, strict=True))
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Found:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingPackageError("Parquet files need pyarrow: pip install pyarrow") from error
    _open(path, lambda: open(path, "rb").close())
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"{path}: row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: damaged, or not Parquet: {reason}") from None


_READERS: dict[str, Callable[[Path], Found]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _read_bytes(path: Path) -> bytes:
    raw = _open(path, path.read_bytes)
    try:
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip data is truncated or damaged: {error}") from None
    return raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark


def _open(path: Path, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:  # a directory, no permission
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _decode(raw: bytes, path: Path, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw[: error.start].count(b"\n")
        raise DataError(
            f"{path}:{line}: not UTF-8: {error.reason} at byte {error.start} of it"
        ) from None


def _parse(raw: bytes, path: Path, line: int) -> Any:
    text = _decode(raw, path, line)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{line + error.lineno - 1}: not JSON: {error.msg} at column {error.colno}"
        ) from None
    except RecursionError:
        raise DataError(f"{path}:{line}: JSON nested too deeply to read") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{path}:{line}: cannot be read: {error}") from None
