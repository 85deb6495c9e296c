"""`lowrank report` on the tiny model, on GGUF, on files without a model, and what it refuses."""

from __future__ import annotations

import importlib
import json
import random
import re

import pytest
import torch
from safetensors.torch import save_file

import lowrank
from lowrank import quant
from tests.models.gguf_models import write_gguf
from tests.models.helpers import llama

FILES = {"report.md", "report.json", "error.png", "layers.png"}


@pytest.fixture
def text(tmp_path):
    words = ["one", "two", "three", "four", "five"]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.choices(words, k=400)), encoding="utf-8")
    return path


@pytest.fixture
def bert(tmp_path):
    """A directory that is no decoder of ours."""
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    tensors = {
        "embeddings.word_embeddings.weight": torch.randn(50, 48),
        "encoder.layer.0.output.dense.weight": torch.randn(48, 96),
        "encoder.layer.0.output.dense.bias": torch.randn(48),
        "encoder.layer.0.output.LayerNorm.weight": torch.randn(48),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def results(folder) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_a_model_and_a_text(run, tiny, text, tmp_path):
    out = tmp_path / "out"
    outcome = run(
        "report", "--model", tiny, "--schemes", "nf4", "int8", "hqq:block_size=32", "--text", text,
        "--tokens", 200, "--window", 64, "--stride", 32, "--rows", 50, "--output", out,
        "--skip", "lm_head", "k_proj", "--seed", 3, "--no-speed",
    )  # fmt: skip
    assert outcome.status == 0 and outcome.err == "", outcome
    assert {path.name for path in out.iterdir()} == FILES
    data = results(out)
    assert [one["scheme"] for one in data["schemes"]] == ["nf4", "int8", "hqq:block_size=32"]
    expected = {"skip": ["lm_head", "k_proj"], "rows": 50, "seed": 3, "window": 64, "stride": 32}
    assert data["about"]["options"] == expected
    assert data["about"]["predicted"] == 199 and data["about"]["model"] == "tiny"
    assert not any("k_proj" in name for name in data["schemes"][0]["layers"])
    table = outcome.out.partition("\n\nsaved: ")[0]
    assert table in (out / "report.md").read_text(encoding="utf-8")

    again = quant.report(
        lowrank.load_model(tiny), ["nf4"], text=text.read_text(), window=64, stride=32, rows=50,
        tokenizer=lowrank.load_tokenizer(tiny), tokens=200, skip=["lm_head", "k_proj"], speed=False,
    )  # fmt: skip
    assert again.to_dict()["schemes"][0] == data["schemes"][0]


def test_every_scheme_by_default(run, tiny):
    outcome = run("report", "--model", tiny, "--no-speed")
    assert outcome.status == 0, outcome
    named = set(re.findall(r"^\| `([\w-]+)`", outcome.out, re.MULTILINE))
    assert named >= {"nf4", "fp4", "af4", "int4", "int4_affine", "hqq", "fitted", "nf3", "int8"}
    assert not named & {"codebook", "flat", "none"}
    assert "perplexity" not in outcome.out and "M=1" not in outcome.out


@pytest.mark.parametrize(("kind", "favoured"), [("Q4_1", True), ("Q8_0", False), ("F32", False)])
def test_gguf_says_what_its_weights_have_been_through(run, tmp_path, kind, favoured):
    write_gguf(tmp_path / "model.gguf", llama(), kind)
    outcome = run(
        "report", "--model", tmp_path / "model.gguf", "--schemes", "hqq", "nf4", "--no-speed",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert outcome.status == 0, outcome
    assert (r"`hqq` \*" in outcome.out) == favoured and r"`nf4` \*" not in outcome.out
    assert results(tmp_path / "out")["about"]["quantized_before"] == (
        None if kind == "F32" else kind
    )


def test_weights_alone(run, bert, tmp_path):
    for model in (bert, bert / "model.safetensors"):
        out = tmp_path / "out"
        outcome = run("report", "--model", model, "--schemes", "nf4", "--output", out)
        assert outcome.status == 0, outcome
        assert results(out)["schemes"][0]["layers"].keys() == {"encoder.layer.0.output.dense"}
        assert "output error" not in outcome.out
    run(
        "report", "--model", bert, "--schemes", "nf4", "--output", out, "--embeddings", "--no-speed"
    )
    assert "embeddings.word_embeddings" in results(out)["schemes"][0]["layers"]


def test_a_strangers_scheme_appears(run, tiny, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text(
        "import torch\n"
        "from lowrank import quant\n"
        "class Halves:\n"
        "    def quantize(self, weight):\n"
        "        tensors = {'h': weight.half()}\n"
        "        return quant.Storage(self.name, tuple(weight.shape), weight.dtype, tensors)\n"
        "    def dequantize(self, storage, dtype=torch.float32):\n"
        "        return storage['h'].to(dtype)\n"
    )
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    points = "halves-of-a-test = stranger:Halves\nbroken-of-a-test = nothing:None\n"
    (info / "entry_points.txt").write_text(f"[lowrank.quantizers]\n{points}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    outcome = run("report", "--model", tiny, "--no-speed")
    assert outcome.status == 0, outcome
    assert re.search(r"^\| `halves-of-a-test` +\| 16.00 ", outcome.out, re.MULTILINE)
    assert "- `broken-of-a-test` failed: quantizer 'broken-of-a-test': its entry" in outcome.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "model is needed: pass --model"),
        ("--model nowhere", "nowhere: no such directory or .gguf file"),
        ("--model nowhere.safetensors", "nowhere.safetensors: no such file"),
        ("--model TINY --schemes nf5", "quantizer: expected one of"),
        ("--model TINY --schemes nf4:size=3", "quantizer 'nf4': expected its own options"),
        ("--model TINY --text nothing.txt", "nothing.txt: No such file or directory"),
        ("--model TINY --text EMPTY", "text: expected at least two tokens"),
        ("--model TINY --text BYTES", "expected UTF-8; invalid start byte at byte 0"),
        ("--model TINY --output EMPTY", "output: expected a directory"),
        ("--model TINY --output EMPTY/below", "output: expected a directory"),
        ("--model TINY --window 100000", "window: expected at most the model's"),
        ("--model TINY --window 16 --stride 17", "stride: expected from 1 to the window of 16"),
        ("--model TINY --tokens 1", "tokens: expected at least 2; got 1"),
        ("--model TINY --skip nowhere", "skip: 'nowhere' matches nothing in the model"),
        ("--model TINY --device cuda:99", "device: cannot use 'cuda:99'"),
        ("--model BERT --text TEXT", "is no model that lowrank runs, its weights alone are"),
    ],
)
def test_refusals(run, tiny, text, bert, tmp_path, words, message):
    (tmp_path / "empty").write_text("")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    places = {"TINY": tiny, "EMPTY": tmp_path / "empty", "BYTES": tmp_path / "bytes"}
    places |= {"BERT": bert, "TEXT": text}
    for name, place in places.items():
        words = re.sub(rf"\b{name}\b", str(place), words)
    outcome = run("report", *words.split())
    assert outcome.status == 2 and outcome.out == ""
    assert message in outcome.err and outcome.err.startswith("lowrank: error: ")
    assert len(outcome.err.splitlines()) == 1
