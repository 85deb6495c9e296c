"""lowrank quantize, and what the other commands do with the directory it wrote."""

from __future__ import annotations

import errno
import json
import os
import re

import pytest
import torch

import lowrank
from lowrank.models.tokenizer import Tokenizer
from tests.quant.bnb_layers import dequantized

FORMATS = ("lowrank", "bitsandbytes")


@pytest.fixture(params=FORMATS)
def quantized(request, run, tiny, tmp_path):
    """(format, the directory) of the tiny model in nf4, in blocks that fit bitsandbytes' rows."""
    outcome = run(
        "quantize", "--model", tiny, "--quantizer", "nf4", "--block-size", 32,
        "--format", request.param, "--output", tmp_path / "deep" / "quantized",
    )  # fmt: skip
    assert outcome.status == 0 and outcome.err == "", outcome
    assert str(tmp_path / "deep" / "quantized") in outcome.out
    return request.param, tmp_path / "deep" / "quantized", outcome


def in_memory(tiny):
    return lowrank.load_model(tiny, lowrank.quant.get("nf4", block_size=32))


def test_it_says_what_it_wrote(quantized, tiny):
    _, folder, outcome = quantized
    model = in_memory(tiny)
    storages = [m.storage for m in model.modules() if isinstance(m, lowrank.QuantLinear)]
    weights = sum(storage.shape[0] * storage.shape[1] for storage in storages)
    said = re.search(r"(\d+) layers of (\d+) weights at ([\d.]+) bits", outcome.out)
    assert (int(said[1]), int(said[2])) == (len(storages), weights) == (28, 393216)
    assert float(said[3]) == round(8 * sum(s.nbytes for s in storages) / weights, 2)
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size / 1e6:.1f} MB" in outcome.out
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["quantized"]


def test_embeddings_are_quantized_if_asked_for_and_a_tied_head_counts_once(run, tiny, tmp_path):
    words = ["--model", tiny, "--quantizer", "nf4", "--embeddings", "--output"]
    outcome = run("quantize", *words, tmp_path / "quantized")
    assert outcome.status == 0 and "29 layers of 466944 weights at 4" in outcome.out
    model = lowrank.load_model(tiny, "nf4", embeddings=True)
    again = lowrank.load_model(tmp_path / "quantized")
    ids = torch.randint(0, 768, (2, 23))
    assert isinstance(again.model.embed_tokens, lowrank.QuantEmbedding)
    assert torch.equal(again(ids), model(ids))
    outcome = run("quantize", *words, tmp_path / "bnb", "--format", "bitsandbytes")
    assert outcome.status != 0 and "model.embed_tokens: expected a linear layer" in outcome.err


def test_the_directory_is_the_model_that_was_quantized(quantized, tiny):
    name, folder, _ = quantized
    ids, expected = torch.randint(0, 768, (2, 23)), in_memory(tiny)
    with torch.no_grad():
        assert torch.equal(lowrank.load_model(folder)(ids), expected(ids))
    if name == "bitsandbytes":
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
        for path, layer in expected.named_modules():
            if isinstance(layer, lowrank.QuantLinear):
                tensors = dict(theirs.get_submodule(path).state_dict())
                assert torch.equal(dequantized(tensors), layer.dequantize())
    assert isinstance(lowrank.load_tokenizer(folder), Tokenizer)


def test_train_generate_and_merge_take_it(quantized, run, tiny, data, tmp_path):
    _, folder, _ = quantized
    words = (
        "--data",
        data,
        "--max-steps",
        3,
        "--learning-rate",
        1e-2,
        "--target-modules",
        "all-linear",
    )
    losses = []
    for name, model in [("a", (folder,)), ("b", (tiny, "--quantizer", "nf4", "--block-size", 32))]:
        outcome = run("train", "--model", *model, *words, "--output-dir", tmp_path / name)
        assert outcome.status == 0, outcome
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss") for line in lines])
    if "lowrank" in quantized:  # bitsandbytes' holds the scales plain
        assert losses[0] == losses[1]
    torch.testing.assert_close(
        torch.tensor([x for x in losses[0] if x]), torch.tensor([x for x in losses[1] if x])
    )
    text = ("--adapter", tmp_path / "a", "--prompt", "What is 3 plus 4?\n", "--max-new-tokens", 8)
    from_folder = run("generate", "--model", folder, *text)
    from_tiny = run("generate", "--model", tiny, "--quantizer", "nf4", "--block-size", 32, *text)
    assert from_folder.status == 0 and from_folder.out == from_tiny.out
    outcome = run(
        "merge", "--model", folder, "--adapter", tmp_path / "a", "--output", tmp_path / "merged"
    )
    assert outcome.status == 0, outcome
    ids = torch.randint(0, 768, (2, 23))
    adapted = lowrank.load_adapter(lowrank.load_model(folder), tmp_path / "a")
    with torch.no_grad():
        merged = lowrank.load_model(tmp_path / "merged")
        torch.testing.assert_close(merged(ids), adapted(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "quantizer: expected a scheme; got none: pass --quantizer nf4"),
        (("--quantizer", "nf5"), "got 'nf5'"),
        (("--quantizer", "nf4", "--format", "gptq"), "argument --format: invalid choice: 'gptq'"),
        (
            ("--quantizer", "int4", "--block-size", "32", "--format", "bitsandbytes"),
            'format="lowrank" takes any scheme',
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run, tiny, tmp_path, words, says):
    outcome = run("quantize", "--model", tiny, *words, "--output", tmp_path / "new" / "x")
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and says in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("int4", "--block-size", "32"), "layers.0.mlp.down_proj: scheme: expected the table of"),
        (("fitted", "--block-size", "32"), "scheme: expected the table of nf4 or fp4"),
        (("hqq",), "scheme: expected nf4, fp4, flat or int8 for bitsandbytes; got 'hqq'"),
        (("nf4", "--block-size", "1024"), "K: expected a multiple of the block size 1024"),
        (
            ("nf4", "--block-size", "32", "--embeddings"),
            "model.embed_tokens: expected a linear layer",
        ),
    ],
)
def test_what_bitsandbytes_cannot_hold_is_refused_before_it_is_made(
    run, tiny, tmp_path, monkeypatch, words, says
):
    monkeypatch.setattr(lowrank, "load_model", lambda *args, **options: pytest.fail("it was read"))
    outcome = run(
        "quantize", "--model", tiny, "--quantizer", *words,
        "--format", "bitsandbytes", "--output", tmp_path / "new" / "x",
    )  # fmt: skip
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and says in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_is_named_as_it_was_given(run, tiny, tmp_path, monkeypatch):
    words = ("quantize", "--model", tiny, "--quantizer", "nf4", "--output")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    for name, said in [
        ("file", "file exists"),
        ("file/below", "file: expected a directory"),
        ("link", "link: Not a directory"),
    ]:
        outcome = run(*words, tmp_path / name)
        assert outcome.status == 2 and outcome.err.count("\n") == 1
        assert f"{tmp_path / said}" in outcome.err

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    outcome = run(*words, tmp_path / "new")
    assert outcome.status == 2
    assert outcome.err == (
        f"lowrank: error: {tmp_path / 'new' / 'model.safetensors'}: No space left on device\n"
    )
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_overwritten_and_nothing_quantized_twice(quantized, run, tiny, tmp_path):
    _, folder, _ = quantized
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    outcome = run("quantize", "--model", tiny, "--quantizer", "int8", "--output", folder)
    assert outcome.status == 2 and f"{folder} exists" in outcome.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    outcome = run(
        "quantize", "--model", folder, "--quantizer", "int8", "--output", tmp_path / "twice"
    )
    assert outcome.status == 2 and "which is quantized already" in outcome.err
    assert not (tmp_path / "twice").exists()
