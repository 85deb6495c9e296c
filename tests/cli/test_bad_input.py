"""What a user gets wrong: exit status 2, one line that says what to do, nothing on disk changed."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder


def refused(outcome, *expected: str, status: int = 2) -> None:
    assert outcome.status == status, outcome
    assert outcome.err.startswith("lowrank: error: ")
    assert outcome.err.count("\n") == 1
    for part in expected:
        assert part in outcome.err


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def train(run, tiny, data, tmp_path):
    """train(*words) of the tiny model; what it is given can be overridden by later words."""

    def call(*words):
        before = listing(tmp_path)
        outcome = run(
            "train", "--model", tiny, "--data", data, "--output-dir", tmp_path / "out",
            "--max-steps", 1, "--r", 4, *words,
        )  # fmt: skip
        if outcome.status:
            assert listing(tmp_path) == before
        return outcome

    return call


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--quantizer", "nf4", "--block-size", "48"], ["block_size", "48", "power of two"]),
        (["--quantizer", "nf4", "--block-size", "8192"], ["block_size", "8192"]),
        (["--quantizer", "nf5"], ["quantizer", "nf4", "nf5"]),
        (["--target-modules", "q_prjo"], ["q_prjo", "q_proj"]),
        (["--r", "0"], ["r", "0"]),
        (["--r", "four"], ["--r", "four", "--help"]),
        (["--learning-rate", "-1"], ["learning_rate", "-1"]),
        (["--learning-rte", "1"], ["--learning-rte", "did you mean --learning-rate?", "train"]),
        (["--block-size", "32"], ["block_size", "32", "--quantizer nf4"]),
        (["--no-double-quant"], ["double_quant", "--quantizer nf4"]),
        (["--embeddings"], ["embeddings", "--quantizer nf4"]),
        (["--exclude-modules", "q_prjo"], ["exclude_modules", "q_prjo", "q_proj"]),
        (["--num-train-epochs", "1e308"], ["num_train_epochs", "1e+308"]),
        (["--output-dir", ""], ["--output-dir", "expected a value"]),
        (["--model", ""], ["--model", "expected a value"]),
        (["--data", "caf\udce9.jsonl"], ["UTF-8", r"caf\udce9"]),
        (["--lr-scheduler-type", "cosin"], ["lr_scheduler_type", "cosin", "cosine"]),
        (["--dtype", "float8"], ["--dtype", "float8", "bfloat16"]),
        (["--device", "gpu"], ["device", "gpu"]),
        (["--device", "meta"], ["device", "meta"]),
        (["--device", "cuda:99"], ["device", "cuda:99"]),
        (["--weights-budget", "-1"], ["weights_budget", "-1"]),
        (["--r", "99999999999"], ["r: expected a rank of 1 to 2**31 - 1; got 99999999999"]),
    ],
)
def test_settings(train, words, expected):
    refused(train(*words), *expected)


def test_no_command_and_no_model(run):
    refused(run(), "COMMAND")
    refused(run("trian"), "trian", "train")
    refused(run("train", "--data", "x.jsonl", "--output-dir", "out"), "model", "--model")
    for command in ("generate --prompt x", "merge --adapter a --output b", "quantize --output b"):
        refused(run(*command.split()), "model is needed", "--model")


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--model", "x", "--adapter", ""],
        ["merge", "--model", "x", "--output", "b", "--adapter", ""],
        ["merge", "--model", "x", "--adapter", "a", "--output", ""],
        ["quantize", "--model", "x", "--output", ""],
        ["train", "--config", ""],
        ["demo", "--model", ""],
        ["demo", "--tiny", "--output-dir", ""],
        ["report", "--model", ""],
    ],
)
def test_a_variable_of_a_script_that_is_not_set(run, words):
    refused(run(*words), f"argument {words[-2]}: expected a value; got ''")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"text": "a"}', '{"text": '], [":2", "JSON"]),
        (['{"prompt": "a"}'], [":1", "completion"]),
        (['{"text": "a"}', '{"txt": "a"}'], [":2", "text"]),
        (['{"text": 3}'], [":1", "text"]),
        ([], ["empty"]),
        (['{"text": ""}'], [":1", "no token is left to learn"]),
        (['{"input_ids": [1, 2, 99999]}'], [":1", "vocab_size", "99999"]),
    ],
)
def test_data(train, tmp_path, lines, expected):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    refused(train("--data", path), str(path), *expected)
    refused(train("--eval-data", path), str(path), *expected)


def test_data_that_is_not_there(train, tmp_path):
    refused(train("--data", tmp_path / "absent.jsonl"), "absent.jsonl")
    refused(train("--data", tmp_path), str(tmp_path))


def test_model_that_is_not_there(train, tmp_path):
    refused(train("--model", tmp_path / "absent"), "absent")
    (tmp_path / "hollow").mkdir()
    refused(train("--model", tmp_path / "hollow"), "config.json")
    (tmp_path / "notes.txt").write_text("hello")
    refused(train("--model", tmp_path / "notes.txt"), "notes.txt")


def test_damaged_weights(train, copy):
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 64 + whole):
        file.write_bytes(damaged)
        refused(train("--model", copy), "model.safetensors")


def test_nan_in_a_weight_is_named(train, copy):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name][1, 3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    refused(train("--model", copy, "--quantizer", "nf4"), name)


def test_missing_and_misshaped_tensors(train, copy):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensor = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    refused(train("--model", copy), name)
    save_file({**tensors, name: tensor[1:].contiguous()}, file, metadata={"format": "pt"})
    refused(train("--model", copy), name, str(tuple(tensor.shape)))


def test_damaged_gguf(train, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    for content in (b"", b"GGUF", b"not gguf" * 8, b"GGUF" + struct.pack("<IQQ", 3, 5, 5)):
        path.write_bytes(content)
        refused(train("--model", path), "model.gguf")


def test_output_that_holds_a_run(train, tmp_path):
    assert train().status == 0
    before = listing(tmp_path)
    refused(train(), "out", "already holds a run")
    assert listing(tmp_path) == before
    assert train("--overwrite-output-dir").status == 0


def test_output_that_is_a_file(train, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused(train(), "out")


@pytest.mark.parametrize(("room", "lacks"), [(40, "run.toml"), (3000, "adapter_model.safetensors")])
def test_a_full_disk(run, tiny, data, tmp_path, room, lacks):
    resource = pytest.importorskip("resource", reason="needs a POSIX system: limits a file's size")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        outcome = run(
            "train", "--model", tiny, "--data", data, "--output-dir", tmp_path / "out",
            "--max-steps", 1, "--disable-tqdm",
        )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = outcome.err.splitlines()[-1]  # after the steps' own lines
    assert outcome.status == 2 and last.startswith("lowrank: error: ") and lacks in last
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out" / lacks).exists()
    assert not list(tmp_path.rglob(".*"))  # a directory with nothing in it has gone too


def test_config_file(run, tmp_path):
    path = tmp_path / "run.toml"
    for text in ("[train", "[trian]\nseed = 1", "[train]\nsede = 1", "[lora]\nr = 'x'\n"):
        path.write_text(text)
        refused(run("train", "--config", path, "--model", "m", "--data", "d", "--output-dir", "o"))
    refused(run("train", "--config", tmp_path / "absent.toml"), "absent.toml: No such file")
    words = (
        "train",
        "--config",
        path,
        "--model",
        "m",
        "--data",
        "d",
        "--output-dir",
        tmp_path / "o",
    )
    for line, expected in {
        'dtype = "float8"': "dtype: expected float32 or bfloat16 or float16; got 'float8'",
        "eval_data = 3": "eval_data: expected TEXT or none; got 3",
        'double_quant = "yes"': "double_quant: expected true|false or none; got 'yes'",
        "block_size = true": "block_size: expected N or none; got True",
        "quantizer = 4": "quantizer: expected TEXT or none; got 4",
    }.items():
        path.write_text(f"[run]\n{line}\n")
        refused(run(*words), expected)


@pytest.fixture
def other_adapter(tmp_path):
    """An adapter of a model with other shapes than the tiny one."""
    import lowrank

    config = DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = lowrank.inject(Decoder(config), lowrank.LoRAConfig(r=2, target_modules="all-linear"))
    lowrank.save_adapter(model, tmp_path / "other")
    return tmp_path / "other"


def test_adapter_of_another_base(run, tiny, other_adapter, tmp_path):
    before = listing(tmp_path)
    refused(run("generate", "--model", tiny, "--adapter", other_adapter, "--prompt", "a"))
    refused(
        run("merge", "--model", tiny, "--adapter", other_adapter, "--output", tmp_path / "merged")
    )
    refused(
        run("merge", "--model", tiny, "--adapter", other_adapter, "--output", tmp_path / "a/b/c")
    )
    assert listing(tmp_path) == before
    assert not (tmp_path / "merged").exists() and not (tmp_path / "a").exists()


def test_damaged_adapter(run, tiny, other_adapter, tmp_path):
    file = other_adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    refused(
        run("generate", "--model", tiny, "--adapter", other_adapter, "--prompt", "a"), file.name
    )
    file.write_bytes(whole)
    (other_adapter / "adapter_config.json").write_text("{")
    refused(
        run("generate", "--model", tiny, "--adapter", other_adapter, "--prompt", "a"),
        "adapter_config.json",
    )
    refused(run("generate", "--model", tiny, "--adapter", tmp_path / "no", "--prompt", "a"), "no")


def test_merge_into_what_is_there(run, tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    refused(run("merge", "--model", tiny, "--adapter", "a", "--output", tmp_path / "mine"), "mine")
    assert listing(tmp_path) == {"mine/file": b"keep"}


def test_nothing_to_generate_from(run, tiny, monkeypatch):
    refused(run("generate", "--model", tiny, "--prompt", ""), "prompt")
    refused(run("generate", "--model", tiny, "--prompt", "a", "--temperature", "-1"), "temperature")
    for flag, value in (("--max-new-tokens", "0"), ("--seed", str(2**70))):
        words = ["generate", "--model", tiny, "--prompt", "a", flag, value]
        refused(run(*words), flag.strip("-").replace("-", "_"))
    with open(os.devnull) as nothing, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", nothing)
        refused(run("generate", "--model", tiny), "prompt", "standard input")
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
        refused(run("generate", "--model", tiny), "prompt", "utf-8", "byte 3")


@pytest.mark.parametrize("whose", ["torch's on a CPU", "Python's", "torch's on a GPU"])
def test_out_of_memory_is_said_in_one_line(run, tiny, monkeypatch, whose):
    def fails(*_, **__):
        if whose == "torch's on a CPU":
            torch.empty(2**60, dtype=torch.uint8)
        raise MemoryError("no room") if whose == "Python's" else torch.OutOfMemoryError("no room")

    monkeypatch.setattr("lowrank.load_model", fails)
    outcome = run("generate", "--model", tiny, "--prompt", "a")
    refused(outcome, "out of memory", "try a smaller", status=3)


@pytest.mark.parametrize("package", ["tokenizers", "gguf"])
def test_a_missing_package_is_named(run, tiny, tmp_path, monkeypatch, package):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    model = tiny
    if package == "gguf":
        model = tmp_path / "model.gguf"
        model.write_bytes(b"GGUF" + bytes(64))
    refused(run("generate", "--model", model, "--prompt", "a"), "pip install", package, status=4)


def test_a_tokenizer_that_is_damaged(run, copy):
    (copy / "tokenizer.json").write_text(json.dumps({"model": {}}))
    refused(run("generate", "--model", copy, "--prompt", "a"), "tokenizer.json")
