"""Tokens kept on disk: what comes back is what was written, to the bit, or nothing."""

from __future__ import annotations

import logging
import os
import random
import string

import pytest
import torch

from lowrank.data import Examples, TokenizedExamples, load_examples, tokenize_all
from lowrank.io import token_cache
from lowrank.io.token_cache import (
    load_tokens,
    save_tokens,
    token_cache_directory,
    token_cache_path,
)


@pytest.fixture
def examples() -> Examples:
    rows = []
    for _ in range(40):
        ids = random.choices(range(99), k=random.randint(1, 20))
        labels = [i if random.random() < 0.5 else -100 for i in ids]
        rows.append({"input_ids": ids, "labels": labels})
    return load_examples(rows)


@pytest.fixture
def data(examples) -> TokenizedExamples:
    return tokenize_all(examples, None, max_length=15)


def same(a: TokenizedExamples, b: TokenizedExamples) -> bool:
    tensors = all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("ids", "labels"))
    names = ("offsets", "labelled", "truncated", "dropped", "notes", "places")
    return tensors and all(getattr(a, name) == getattr(b, name) for name in names)


def test_what_was_written_comes_back(tmp_path, examples, data):
    assert data.truncated and data.dropped and len(data.notes) == 2
    path = tmp_path / "deep" / "a.safetensors"
    assert load_tokens(path, examples) is None
    save_tokens(path, data, examples)
    assert same(load_tokens(path, examples), data)
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_every_flipped_bit_and_every_cut_is_seen(tmp_path, examples, data, caplog):
    """Nothing of a damaged file is used; what reads as the same is the same."""
    path = tmp_path / "a.safetensors"
    save_tokens(path, data, examples)
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    places = [*range(header), *random.sample(range(header, len(raw)), 60)]
    refused = 0
    for at in places:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << random.randrange(8)]) + raw[at + 1 :])
        found = load_tokens(path, examples)
        assert found is None or (at < header and same(found, data))
        refused += found is None
    assert refused > 0.9 * len(places)
    for cut in [0, 1, 8, header, *random.sample(range(len(raw)), 10)]:
        path.write_bytes(raw[:cut])
        assert load_tokens(path, examples) is None
    path.write_bytes(raw + b"\0")
    assert load_tokens(path, examples) is None
    assert "is damaged, and is made again" in caplog.text
    path.unlink()
    path.mkdir()
    assert load_tokens(path, examples) is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, examples, data, caplog, monkeypatch):
    (tmp_path / "file").write_text("mine")
    save_tokens(tmp_path / "file" / "a.safetensors", data, examples)
    assert "are not kept for the next run" in caplog.text
    caplog.clear()

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache, "write_safetensors", full)
    save_tokens(tmp_path / "a.safetensors", data, examples)
    assert "No space left on device" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_path_tells_everything_apart(tmp_path):
    options = {"examples": "ab", "tokenizer": "cd", "max_length": 8, "completion_only_loss": True}
    paths = {token_cache_path(tmp_path, **options)}
    assert paths == {token_cache_path(str(tmp_path), **dict(reversed(options.items())))}
    for name, value in options.items():
        other = not value if isinstance(value, bool) else value * 2
        paths.add(token_cache_path(tmp_path, **{**options, name: other}))
    assert len(paths) == 5 and all(path.parent == tmp_path for path in paths)


def test_the_users_own_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("LOWRANK_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if os.name == "posix":
        assert token_cache_directory() == tmp_path / ".cache" / "lowrank"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert token_cache_directory() == tmp_path / "x" / "lowrank"
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "y"))
    assert token_cache_directory() == tmp_path / "y"


def test_a_fingerprint_is_of_what_is_said(tmp_path, examples, data, caplog):
    caplog.set_level(logging.INFO)
    rows = [{"text": word} for word in string.ascii_letters]
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"id": 3, "text": "{r["text"]}"}}\n' for r in rows)
    )
    prints = [load_examples(source).fingerprint for source in (rows, tmp_path / "a.jsonl")]
    assert prints[0] == prints[1]  # the file, its other fields and its spaces do not matter
    others = [rows[:-1], rows[::-1], [*rows[:-1], {"text": "z"}], [*rows, {"text": ""}]]
    assert len({prints[0], *(load_examples(other).fingerprint for other in others)}) == 5

    whole = data.fingerprint
    for name in ("ids", "labels"):
        tensor = getattr(data, name)
        tensor[7] += 1
        assert data.fingerprint != whole
        tensor[7] -= 1
    assert data.fingerprint == whole
    data.offsets[3] -= 1
    assert data.fingerprint != whole
