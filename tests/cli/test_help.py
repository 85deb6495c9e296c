"""What --help shows works as pasted, in the order of the commands."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys

import pytest
from safetensors.torch import load_file, save_file

from lowrank.cli.main import COMMANDS

from .conftest import write_pairs

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
NAMES = [module.__name__.rpartition(".")[2] for module in COMMANDS]


def examples(text: str) -> list[list[str]]:
    """The commands of a help text, as a shell has them."""
    lines = re.findall(r"^  (lowrank (?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [shlex.split(line.replace("\\\n", " ")) for line in lines]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """Where a reader sits: the tiny model stands for the one on the hub, and there is some data."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(tiny, folder / HUB_NAME)
    weights = load_file(tiny / "model.safetensors")
    kept = {name: weights[name] for name in list(weights)[:4]}
    save_file(kept, folder / "weights.safetensors")
    write_pairs(folder / "train.jsonl", 8)
    write_pairs(folder / "held_out.jsonl", 4)
    (folder / "text.txt").write_text("A function returns the values of a list. " * 20)
    qwen = {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "head_dim": 128,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (folder / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    (folder / "Qwen" / "Qwen3-8B" / "config.json").write_text(json.dumps(qwen))
    run = f'[run]\nmodel = "{HUB_NAME}"\ndata = "train.jsonl"\n[train]\noutput_dir = "x"\n'
    (folder / "run.toml").write_text(run)
    (folder / "prompt.txt").write_text("Once upon a time")
    return folder


@pytest.mark.parametrize("name", [name for name in NAMES if name != "demo"])  # has a test for it
def test_examples_work_as_pasted(run, folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    found = examples(run(name, "--help").out)
    assert found, f"lowrank {name} --help has no example"
    if name not in ("train", "env") and not (folder / "out").exists():  # run by itself
        assert run(*examples(run("train", "--help").out)[0][1:], "--max-steps", 1).status == 0
    for program, *words in found:
        assert program == "lowrank" and words[0] == name
        if "<" in words:
            at = words.index("<")
            text = (folder / words[at + 1]).read_text()
            monkeypatch.setattr(sys, "stdin", io.StringIO(text))
            del words[at : at + 2]
        # one step tells; and the tiny model's rows are no multiple of 64, as bitsandbytes asks
        words += ["--max-steps", "1"] if name in ("train", "sweep") else []
        words += ["--no-refine", "--longer", "1"] if name == "sweep" else []
        words += ["--block-size", "32"] if "bitsandbytes" in words else []
        outcome = run(*words)
        answers = (0, 1) if "--card" in words else (0,)
        assert outcome.status in answers and not outcome.err.startswith("lowrank: "), outcome


def test_the_example_of_the_demo_is_the_one_that_is_tested(run):
    """By test_demo.py."""
    assert ["lowrank", "demo", "--tiny"] in examples(run("demo", "--help").out)


@pytest.mark.parametrize("name", NAMES)
def test_help_begins_with_examples(run, name):
    lines = run(name, "--help").out.splitlines()
    assert lines[0] == f"usage: lowrank {name} [flags]"
    assert any(line.startswith(f"  lowrank {name}") for line in lines[2:6])
