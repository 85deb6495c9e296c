"""The page of the long result, made of runs that are there already."""

from __future__ import annotations

import json

from benchmarks import e2e


def runs(methods=("full", "lora", "qlora", "dora"), seeds=(0, 1, 2), speed=10.0, steps=150):
    return [
        {
            "method": method, "seed": seed, "steps": steps, "batch": 8, "meanings": 100,
            "held_out": 256, "losses": [3.0, 2.0, 1.5 + seed / 10],
            "loss_before": 4.25 if method == "qlora" else 4.0,
            "loss_after": 1.4 + number / 100 + seed / 1000, "bleu": 50.0 + number + seed,
            "tokens_per_second": speed * (number + 1), "peak_bytes": 1e9, "trainable": 4884480,
        }
        for number, method in enumerate(methods)
        for seed in seeds
    ]  # fmt: skip


def test_table_has_means_and_spreads():
    lines = e2e.table(runs(), runs()).splitlines()
    assert lines[2] == "| full fine-tuning | 4.9 M | 1.4010 ± 0.0010 | 51.0 ± 1.0 | 1000 | 10 |"
    assert lines[4] == "| QLoRA, NF4 | 4.9 M | 1.4210 ± 0.0010 | 53.0 ± 1.0 | 1000 | 30 |"


def test_speeds_are_those_of_runs_that_were_alone():
    page = e2e.page(runs(), runs(seeds=(0,), speed=100.0, steps=20), "e2e.png")
    assert "| 52.0 ± 1.0 | 1000 | 200 |" in page
    assert "takes 150 steps of 8 pairs" in page
    assert "`--steps 20 --seeds 0 --output FOLDER`" in " ".join(page.split())
    assert "--speeds" not in e2e.page(done := runs(), done, "e2e.png")


def test_noise_is_of_the_same_seeds():
    said = e2e.noise(runs())
    assert "held-out loss by +0.0100 (LoRA's seeds: ± 0.0010)" in said
    assert "by +0.2500 before training, and training leaves +0.0100 of that" in said
    assert "BLEU by +1.0 (LoRA's seeds: ± 1.0)" in said


def test_runs_of_other_methods_are_no_speeds(tmp_path, capsys):
    (tmp_path / "lora-0.json").write_text(json.dumps(runs(("lora",), (0,))[0]))
    assert e2e.main(["--speeds", str(tmp_path), "--methods", "qlora"]) == 2
    assert "expected a run of each method" in capsys.readouterr().err


def test_picture_is_drawn(tmp_path):
    e2e.draw(runs(), tmp_path / "e2e.png")
    assert (tmp_path / "e2e.png").stat().st_size > 10_000
