"""Without an optional package, the message is the command that installs it."""

import sys

import pytest

import lowrank
from lowrank.data import load_examples
from lowrank.data.chat import render_chat
from lowrank.errors import MissingPackageError


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("gguf", lambda folder: lowrank.load_model(folder / "m.gguf")),
        ("tokenizers", lambda folder: lowrank.load_tokenizer(folder)),
        ("huggingface_hub", lambda folder: lowrank.load_model("owner/name")),
        ("pyarrow", lambda folder: load_examples(folder / "data.parquet")),
        ("jinja2", lambda folder: render_chat([], "{{ messages }} without jinja2")),
    ],
)
def test_the_message_says_what_to_install(tmp_path, monkeypatch, package, call):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=f"pip install {package}"):
        call(tmp_path)
