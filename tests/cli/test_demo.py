"""`lowrank demo --tiny`, all of it; what it shows is checked against what it wrote."""

from __future__ import annotations

import json
import re

import pytest
import torch

import lowrank
from lowrank.cli.demo import TINY, spread
from lowrank.data.stdlib import instruction_set

from .test_commands import python


def test_demo_tiny(tmp_path):
    pytest.importorskip("matplotlib")
    process = python("-W", "error", "-m", "lowrank", "demo", "--tiny", cwd=tmp_path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    before, after = map(float, re.search(r"loss ([\d.]+) before, ([\d.]+) after", out).groups())
    assert after < before - 0.5
    for expected in (
        "budget",
        "trainable params: ",
        "tokens/s",
        "GiB",
        "same answers",
        "lowrank train",
    ):
        assert expected in out
    for name in ("before", "after", "docstring"):
        assert len(re.findall(rf"^{name} ", out, re.MULTILINE)) == 3

    folder = tmp_path / "demo-out"
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert evaluated[0] == pytest.approx(before, abs=1e-4)
    assert evaluated[-1] == pytest.approx(after, abs=1e-4)

    # the adapter on disk is the one that was measured
    model = lowrank.load_model(TINY, quantizer="nf4")
    lowrank.load_adapter(model, folder)
    tokenizer = lowrank.load_tokenizer(TINY)
    total = labelled = 0
    for pair in spread(instruction_set()[1], 200):
        prompt, answer = tokenizer.encode(pair["prompt"]), tokenizer.encode(pair["completion"])
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])[:, :256]
        with torch.no_grad():
            logp = model(ids).log_softmax(-1)[0, len(prompt) - 1 : -1]
        total -= logp.gather(1, ids[0, len(prompt) :, None]).sum().item()
        labelled += ids.shape[1] - len(prompt)
    assert total / labelled == pytest.approx(after, abs=2e-3)

    # the next one takes its place
    process = python("-m", "lowrank", "demo", "--tiny", "--steps", 2, cwd=tmp_path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert "2 steps" in out


def test_demo_does_not_replace_what_is_named(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    outcome = run("demo", "--tiny", "--output-dir", tmp_path)
    assert outcome.status == 2
    assert "already holds a run" in outcome.err


def test_spread_is_even_and_of_the_parts():
    assert spread(list(range(10)), 5) == [1, 3, 5, 7, 9]
    assert spread(list(range(3)), 5) == [0, 1, 2]


@pytest.mark.slow
def test_demo_of_a_real_model(smollm2, tmp_path):
    process = python("-m", "lowrank", "demo", "--model", smollm2, "--steps", 8, cwd=tmp_path)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    before, after = map(float, re.search(r"loss ([\d.]+) before, ([\d.]+) after", out).groups())
    assert after < before
    assert "same answers" in out
