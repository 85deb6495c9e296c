"""`lowrank plan`: what it prints, what its status says, and mistakes."""

from __future__ import annotations

import json

import pytest

LLAMA = ["--hidden-size", 1024, "--num-hidden-layers", 4, "--num-attention-heads", 8]
QLORA = ["--quantizer", "nf4", "--r", 8, "--target-modules", "all-linear"]


def test_what_fits_and_what_does_not(run):
    found = run("plan", *LLAMA, *QLORA, "--max-length", 256, "--card", "8 GB")
    assert found.status == 0 and "fits 8 GB with 8.00 GB" in found.out
    assert "largest batch of 256 tokens" in found.out and "it fits with" not in found.out
    found = run("plan", *LLAMA, *QLORA, "--card", "2 GB")
    assert found.status == 1 and "does not fit 2 GB" in found.out
    assert "it fits with --gradient-checkpointing" in found.out


def test_the_parts_add_up_and_the_largest_batch_is_the_largest(run):
    words = ["plan", *LLAMA, *QLORA, "--max-length", 256, "--card", "4 GB", "--json"]
    found = json.loads(run(*words).out)
    assert sum(found["components"].values()) == found["training"] == found["peak"]
    assert found["card_bytes"] == 4 << 30
    best = found["largest_batch"]
    assert best > 1
    at = [run(*words, "--per-device-train-batch-size", n).status for n in (best, best + 1)]
    assert at == [0, 1]
    longest = found["largest_length"]
    assert [run(*words[:-2], "4 GB", "--max-length", n).status for n in (longest, longest + 1)] == [
        0,
        1,
    ] or longest == 2048


def test_remedies_do_what_they_say(run):
    words = ["plan", *LLAMA, "--full", "--card", "2 GB"]
    found = json.loads(run(*words, "--json").out)
    assert found["fits"] is False and found["remedies"]
    for remedy in found["remedies"]:
        assert remedy["peak"] <= found["card_bytes"]
        flags = []
        for name, value in remedy["changes"].items():
            if name == "lora":
                flags += ["--no-full", "--r", value["r"], "--target-modules", "all-linear"]
            else:
                flags += [f"--{name.replace('_', '-')}", str(value).lower()]
        again = json.loads(run(*words, *flags, "--json").out)
        assert again["fits"] and again["peak"] == remedy["peak"]


def test_a_training_file_is_taken_as_it_is(run, tmp_path, tiny):
    file = tmp_path / "run.toml"
    file.write_text(
        f'[run]\nmodel = "{tiny}"\ndata = "there.jsonl"\nquantizer = "int8"\n'
        '[train]\noutput_dir = "out"\nlearning_rate = 1e-3\nmax_length = 64\nbf16 = true\n'
        "[lora]\nr = 4\n"
    )
    found = run("plan", "--config", file)
    assert found.status == 0 and "8 x 64 tokens" in found.out and "autocast" in found.out
    assert "16 x 64" in run("plan", "--config", file, "--per-device-train-batch-size", 16).out
    other = run("plan", "--config", file, *LLAMA)
    assert other.status == 0 and other.out != found.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "model: expected --model, or numbers"),
        (["--model", "tiny", *LLAMA], "model: expected --model, or numbers"),
        (["--hidden-size", 64], "num_hidden_layers, num_attention_heads missing"),
        ([*LLAMA, "--card", "40900"], "card: expected a card's name or its memory"),
        ([*LLAMA, "--card", "0 GB"], "card: expected a positive number of GB"),
        ([*LLAMA, "--card", "a100 24gb"], "A100 has 40 GB"),
        ([*LLAMA, "--optim", "adam"], "optim: expected one of"),
        ([*LLAMA, "--block-size", 64], "block_size: belongs to a quantizer"),
        ([*LLAMA, "--quantizer", "nf5"], "nf5"),
        ([*LLAMA, "--devices", 0], "devices"),
        ([*LLAMA, "--device", "tpu"], "device: expected cpu or cuda"),
        ([*LLAMA, "--target-modules", "nothing"], "nothing"),
        (["--model", "no/such/place"], "no such directory, config.json"),
    ],
)
def test_a_mistake_is_one_line(run, words, said):
    found = run("plan", *words)
    assert found.status == 2 and found.out == ""
    assert found.err.startswith("lowrank: error: ") and said in found.err
    assert found.err.count("\n") == 1
