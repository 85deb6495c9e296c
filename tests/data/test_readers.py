"""Tables and other libraries' data sets: what comes out of them, and what is refused."""

from __future__ import annotations

import csv
import gzip
import random

import pytest

from lowrank.data import load_examples, tokenize_all
from lowrank.errors import DataError

from .test_examples import some, words


def write_csv(path, rows: list[dict], delimiter: str = ",") -> None:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "A.CSV", "a.csv.gz"])
@pytest.mark.parametrize("kind", ["text", "completion"])
def test_csv(tmp_path, name, kind):
    rows = some(kind, 9)
    path = tmp_path / name
    write_csv(path, rows, "\t" if "tsv" in name else ",")
    found = load_examples(path)
    for row in rows:
        del row["id"]
    assert list(found) == rows and found.kind == kind


def test_a_place_in_csv_is_where_the_row_begins(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes('\ufefftext,id\r\n"one\r\ntwo",1\r\n\r\nthree,2\r\n'.encode())
    found = load_examples(path)
    assert [row["text"] for row in found] == ["one\r\ntwo", "three"]
    assert [found.where(i) for i in range(2)] == [f"{path}:2", f"{path}:5"]


def test_a_long_cell(tmp_path):
    """Longer than Python's csv takes unless told to, and its limit is as it was afterwards."""
    before = csv.field_size_limit()
    path = tmp_path / "data.csv"
    write_csv(path, [{"text": "a" * (before + 1)}])
    assert len(load_examples(path)[0]["text"]) == before + 1
    assert csv.field_size_limit() == before


BAD_CSV = {
    "fewer cells": (b"prompt,completion\na,b\nc\n", ":3: expected 2 cells as in the header; got 1"),
    "more cells": (b"text\na\nb,c\n", ":3: expected 1 cells as in the header; got 2"),
    "open quote": (b'text\n"a\nb\n', ":2: not CSV: unexpected end of data"),
    "text after a quote": (b'text\n"a"b\n', ":2: not CSV: "),
    "not UTF-8": (b"text\na\n\xff\n", ":3: not UTF-8"),
    "one name twice": (b"text,text\na,b\n", ":1: two columns have one name"),
    "no field": (b"txt\na\n", ":2: lacks a field to train on: .*; got 'txt'"),
    "no rows": (b"text\n", ": expected at least one example"),
    "nothing": (b"", ": expected at least one example"),
}


@pytest.mark.parametrize("name", BAD_CSV)
def test_a_bad_csv_is_named(tmp_path, name):
    raw, message = BAD_CSV[name]
    path = tmp_path / "data.csv"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=f"^{path}{message}") as caught:
        load_examples(path)
    assert "\n" not in str(caught.value)


def columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row.get(name) for row in rows] for name in {n for row in rows for n in row}}


TOOLS = '[{"type": "function", "function": {"name": "f"}}]'


@pytest.mark.parametrize("kind", ["text", "completion", "messages", "tokens"])
def test_parquet(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install pyarrow")
    rows = some(kind, 700)
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table(columns(rows)), path, row_group_size=300)
    found = load_examples(path)
    for row in rows:
        del row["id"]
    assert list(found) == rows and found.where(699) == f"{path}: row 699"


def test_what_a_table_fills_with_nothing_is_not_there(tmp_path):
    """Every row of a table has every column, and every message every field."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install pyarrow")
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, call], "tools": TOOLS, "text": None},
    ]
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table(columns(rows)), path)
    first, second = load_examples(path)
    assert first == rows[0]
    assert second["messages"] == [rows[1]["messages"][0], {**call, "content": None}]
    assert second["tools"] == [{"type": "function", "function": {"name": "f"}}]


def test_a_damaged_parquet_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install pyarrow")
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"text": [words(50) for _ in range(99)]}), path)
    raw = path.read_bytes()
    for damaged in (b"", b"PAR1", raw[:-9], raw[: len(raw) // 2], b'{"text": "a"}\n'):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"^{path}: damaged, or not Parquet: ") as caught:
            load_examples(path)
        assert "\n" not in str(caught.value)
    for _ in range(20):  # somewhere: refused, or what was changed is no part of the text
        at = random.randrange(len(raw))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << random.randrange(8)]) + raw[at + 1 :])
        try:
            load_examples(path)
        except DataError as error:
            assert str(error).startswith(f"{path}: ")
    with pytest.raises(DataError, match="nowhere.parquet: no such file"):
        load_examples(tmp_path / "nowhere.parquet")
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(DataError, match="folder.parquet: cannot be read: Is a directory"):
        load_examples(tmp_path / "folder.parquet")


def test_data_sets_of_hugging_face():
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install datasets")
    rows = some("messages", 30)
    made = datasets.Dataset.from_list(rows)
    for row in rows:
        del row["id"]
    assert list(load_examples(made)) == rows
    part = made.select(range(10, 20))
    assert list(load_examples(part)) == rows[10:20]
    with pytest.raises(DataError, match=r"got DatasetDict: pass a list, .*data\['train'\]"):
        load_examples(datasets.DatasetDict(train=made, test=part))
    with pytest.raises(DataError, match=r"got IterableDataset: pass list\(data\)"):
        load_examples(made.to_iterable_dataset())
    ids = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4, 5]]}).with_format("torch")
    assert tokenize_all(load_examples(ids), None).ids.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"text"}, r"got set: pass list\(data\)"),
        (iter([]), r"got list_iterator: pass list\(data\)"),
        ({"text": ["a", "b"]}, r"got dict: pass a list, or .* data\['text'\]"),
        (3, "got int: pass a list"),
    ],
)
def test_what_is_no_sequence_of_rows(given, message):
    with pytest.raises(DataError, match=f"^data must be a path or a sequence of dicts; {message}"):
        load_examples(given)


def test_a_frame_of_pandas_names_the_way():
    pandas = pytest.importorskip("pandas", reason="needs pandas: pip install pandas")
    frame = pandas.DataFrame(some("completion", 4))
    with pytest.raises(DataError, match=r"got DataFrame: pass data.to_dict\('records'\)"):
        load_examples(frame)
    assert len(load_examples(frame.to_dict("records"))) == 4
