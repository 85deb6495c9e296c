"""Adapters that start with a part of the weights, or from data, from the command line."""

from __future__ import annotations

import pytest
import torch

import lowrank


@pytest.mark.parametrize(
    "start",
    [
        ("loftq", "--loftq-config", "loftq_iter=3"),
        ("pissa_niter_4",),
        ("olora", "--loraplus-lr-ratio", 8),
        ("eva", "--eva-config", "rho=1.5", "use_label_mask=0"),
    ],
    ids=lambda s: s[0],
)
def test_train_generate_and_merge(start, run, tiny, data, tmp_path):
    words = ("--model", tiny, "--quantizer", "nf4")
    outcome = run(
        "train", *words, "--data", data, "--output-dir", tmp_path / "out", "--max-steps", 3,
        "--target-modules", "all-linear", "--init-lora-weights", *start,
    )  # fmt: skip
    assert outcome.status == 0, outcome
    again = run("train", "--config", tmp_path / "out/run.toml", "--output-dir", tmp_path / "out2")
    assert again.status == 0, again
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "out2")]
    assert files[0].read_bytes() == files[1].read_bytes()

    model = lowrank.load_model(tiny, quantizer="nf4")
    lowrank.load_adapter(model, tmp_path / "out", weights=lowrank.open_weights(tiny))
    expected = lowrank.generate(model, lowrank.load_tokenizer(tiny), "What is", max_new_tokens=8)
    adapter = ("--adapter", tmp_path / "out")
    outcome = run("generate", *words, *adapter, "--prompt", "What is", "--max-new-tokens", 8)
    assert outcome.out == expected + "\n", outcome
    outcome = run("merge", *words, *adapter, "--output", tmp_path / "merged")
    assert outcome.status == 0, outcome
    ids = torch.randint(0, 768, (2, 23))
    with torch.no_grad():
        merged = lowrank.load_model(tmp_path / "merged")
        torch.testing.assert_close(merged(ids), model(ids), atol=1e-4, rtol=1e-4)


def test_what_it_needs_is_said(run, tiny, data, tmp_path):
    words = ("--model", tiny, "--data", data, "--output-dir", tmp_path / "out")
    outcome = run("train", *words, "--init-lora-weights", "loftq")
    assert outcome.status == 2 and "pass quantizer='nf4'" in outcome.err
    assert (
        run("quantize", "--model", tiny, "--quantizer", "nf4", "--output", tmp_path / "q").status
        == 0
    )
    words = ("--model", tmp_path / "q", *words[2:])
    outcome = run("train", *words, "--init-lora-weights", "loftq")
    assert outcome.status == 2 and "it is missing" in outcome.err
    assert not (tmp_path / "out").exists()
