"""Reading examples: what is taken, and the place of everything that is refused."""

from __future__ import annotations

import gzip
import json
import random
import string

import pytest
import torch

from lowrank.data import load_examples
from lowrank.errors import DataError


def words(count: int) -> str:
    alphabet = string.ascii_letters + ' \n\t"\\äß漢🙂\u2028'
    return "".join(random.choices(alphabet, k=count))


def some(kind: str, count: int) -> list[dict]:
    make = {
        "text": lambda: {"text": words(9)},
        "completion": lambda: {"prompt": words(5), "completion": words(7)},
        "messages": lambda: {
            "messages": [
                {"role": "user", "content": words(4)},
                {"role": "assistant", "content": words(3)},
            ]
        },
        "tokens": lambda: {"input_ids": random.choices(range(99), k=4), "labels": [-100, 3, 0, 1]},
    }[kind]
    return [{**make(), "id": i} for i in range(count)]


@pytest.mark.parametrize("kind", ["text", "completion", "messages", "tokens"])
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "ascii", "windows", "json", "list"])
def test_every_kind_in_every_form(tmp_path, kind, form):
    rows = some(kind, 7)
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(row, ensure_ascii=form == "ascii") for row in rows]
    if form == "jsonl.gz":
        path = tmp_path / "data.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    elif form == "windows":  # a byte order mark, carriage returns, empty lines
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode() + b"\r\n")
    elif form == "json":
        path = tmp_path / "data.json"
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = load_examples(rows if form == "list" else path)
    for row in rows:
        del row["id"]  # what is no field of its kind is left out
    assert list(found) == rows and found.kind == kind and len(found) == 7
    where = {"list": "example 6", "json": f"{path}: item 6", "windows": f"{path}:13"}
    assert found.where(6) == where.get(form, f"{path}:7")


def test_any_sequence_is_read_by_its_index():
    class Lazy:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return {"text": str(i)}

    assert [row["text"] for row in load_examples(Lazy())] == ["0", "1", "2"]
    assert load_examples(found := load_examples(Lazy())) is found
    ids = torch.randint(0, 9, (5,))
    assert load_examples([{"input_ids": ids}]).kind == "tokens"


GOOD = '{"text": "fine"}'
BAD_LINES = {
    "not JSON": ('{"text": "open', r"not JSON: .* at column 10"),
    "not JSON at all": ("text: yes", "not JSON: Expecting value at column 1"),
    "a string": ('"text"', "expected a JSON object with 'text', .*; got str"),
    "a list": ("[1, 2]", "expected a JSON object .*; got list"),
    "no field": ('{"txt": "a", "id": 3}', "lacks a field to train on: .*; got 'txt', 'id'"),
    "no fields": ("{}", "lacks a field to train on: .*; got no fields"),
    "no completion": ('{"prompt": "a"}', "has 'prompt' but lacks the field 'completion'"),
    "no prompt": ('{"completion": "a"}', "has 'completion' but lacks the field 'prompt'"),
    "another kind": ('{"prompt": "a", "completion": "b"}', "is of kind 'completion', .* 'text'"),
    "two kinds": ('{"text": "a", "messages": []}', "fields of 2 kinds .* 'text' and 'messages'"),
    "a number": ('{"text": 3}', r"'text' must be text; got int \(3\)"),
    "null": ('{"text": null}', r"'text' must be text; got NoneType"),
    "a surrogate": (r'{"text": "\ud800"}', "'text' has a lone surrogate"),
    "too deep": ("[" * 100_000, "nested too deeply"),
    "too long a number": ('{"input_ids": [' + "9" * 9999 + "]}", "cannot be read: .* 9999 digits"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, name):
    line, message = BAD_LINES[name]
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n\n{GOOD}\n{line}\n{GOOD}\n", encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_examples(path)
    assert str(caught.value).startswith(f"{path}:4: ") and "\n" not in str(caught.value)


BAD_ROWS = {
    "messages text": ({"messages": "hello"}, "'messages' must be a list of objects; got str"),
    "no messages": ({"messages": []}, "'messages' is empty"),
    "message text": ({"messages": ["hello"]}, r"messages\[0\] must be an object; got str"),
    "no role": ({"messages": [{"content": "a"}]}, r"messages\[0\] lacks the field 'role'"),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\] lacks the field 'content'"),
    "content list": (
        {"messages": [{"role": "user", "content": ["a"]}]},
        r"messages\[0\]\['content'\] must be text; got list",
    ),
    "ids text": ({"input_ids": "abc"}, "'input_ids' must be a list of whole numbers"),
    "ids floats": ({"input_ids": [1, 2.0]}, "'input_ids' must be a list of whole numbers"),
    "ids negative": ({"input_ids": [1, -3]}, r"'input_ids' must lie from 0 to .*; got -3 to 1"),
    "ids large": ({"input_ids": [2**31]}, "'input_ids' must lie from 0"),
    "labels fewer": ({"input_ids": [1, 2], "labels": [1]}, "'labels' must be as many .*, 2; got 1"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_example_is_named(name):
    row, message = BAD_ROWS[name]
    good = {"input_ids": [1]} if "input_ids" in row else some("messages", 1)[0]
    with pytest.raises(DataError, match=f"^example 2: {message}"):
        load_examples([good, good, row])


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=f"^{path}:2: not UTF-8"):
        load_examples(path)
    path.write_bytes(b'[{"text": "a"},\n\n{"text": "\xff"}]')
    with pytest.raises(DataError, match=f"^{path}:3: not UTF-8"):
        load_examples(path)


def test_a_list_that_is_not_json_names_its_line(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[\n{"text": "a"},\n{"text": "b"}\n{"text": "c"}\n]')
    with pytest.raises(DataError, match=f"^{path}:4: not JSON"):
        load_examples(path)
    path.write_text('[\n{"text": "a"},\n{"txt": "b"}]')
    with pytest.raises(DataError, match=f"^{path}: item 1: lacks a field"):
        load_examples(path)


def test_an_object_of_several_lines_is_told_from_a_broken_one(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"data": [{"text": "a"}]}, indent=2), encoding="utf-8")
    with pytest.raises(DataError, match=f"^{path}:1: expected a whole object in each line, or one"):
        load_examples(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
        load_examples(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        load_examples(tmp_path)
    packed = gzip.compress(random.randbytes(5000))
    for name, raw in {
        "cut": packed[:-900],
        "broken": packed[:99] + b"?" * 99 + packed[198:],
    }.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(raw)
        with pytest.raises(DataError, match=f"{name}.jsonl.gz: "):
            load_examples(path)


@pytest.mark.parametrize("content", ["", "\n\n \n", "[]"])
def test_an_empty_file(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=f"{path}: .* the data set is empty"):
        load_examples(path)


@pytest.mark.parametrize("source", [{"text": "a"}, iter([]), 3, None])
def test_what_is_no_sequence(source):
    with pytest.raises(DataError, match="data must be a path or a sequence of dicts; got"):
        load_examples(source)
