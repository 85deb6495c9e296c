"""Tables say what the JSON holds: losses as well as wins, and what was wrong."""

from __future__ import annotations

import copy

from benchmarks import table
from benchmarks.settings import add_rates

OP_ROW = {
    "benchmark": "codebook_linear",
    "case": "4096x4096 M=1 forward",
    "contender": "torch fp32",
    "median_ms": 2.0,
    "p10_ms": 1.9,
    "p90_ms": 2.25,
    "n": 41,
    "error": 2.5e-7,
    "extra_bytes": 1_500_000,
    "path": "",
    "gbs": 33.5,
    "tflops": 0.0168,
    "floor_ms": 1.5,
    "baseline": "torch fp32",
    "speed": 1.0,
}
STEP_ROW = {
    "benchmark": "training_step",
    "case": "a model",
    "contender": "lowrank",
    "path": "",
    "median_ms": 1530.0,
    "p10_ms": 1500.0,
    "p90_ms": 1600.0,
    "n": 18,
    "tokens_per_second": 321.4,
    "peak_bytes": 640_000_000,
    "load_peak_bytes": 700_000_000,
    "losses": [3.21, 2.1],
    "loss_difference": 4e-4,
    "baseline": "peer",
    "speed": 2.5,
}
RESULT = {
    "machine": {
        "cpu": "A CPU",
        "cpu_family_model": "6/1",
        "cores": 2,
        "threads": 2,
        "l3_bytes": 32 << 20,
        "flags": ["avx2", "fma"],
        "system": "Linux",
        "python": "3.11",
        "versions": {"torch": "2.13.0"},
        "commit": "abc1234",
    },
    "run": {"date": "2026-01-02", "isa": "avx2", "working_set": 128 << 20, "seconds": 6.0},
    "ceilings": {"copy_gbs": 20.0, "read_gbs": 33.3, "matmul_tflops": 0.17},
    "notes": ["without peft: not installed"],
    "rows": [],
}


def result(*rows: dict) -> dict:
    return {**copy.deepcopy(RESULT), "rows": list(rows)}


def cells(text: str, contender: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {contender} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_head_names_machine_restriction_ceilings_and_notes():
    text = table.render(result(OP_ROW))
    for said in ("A CPU", "restricted to avx2", "torch 2.13.0", "abc1234", "2026-01-02"):
        assert said in text
    assert "copy 20.0 GB/s, read 33.3 GB/s, float32 matmul 170 GFLOP/s" in text
    assert "- without peft: not installed" in text


def test_an_operator_row():
    loss = {**OP_ROW, "contender": "lowrank fp32", "median_ms": 4.0, "speed": 0.5, "path": "cpu"}
    text = table.render(result(OP_ROW, loss))
    assert "### codebook_linear: 4096x4096 M=1 forward" in text
    assert cells(text, "torch fp32") == [
        *("torch fp32", "2", "1.9–2.25", "41", "1.00×", "33.5", "0.0168", "75 %", "2.5e-07"),
        *("1.5", ""),
    ]
    assert cells(text, "lowrank fp32")[4] == "0.50×"
    assert cells(text, "lowrank fp32")[-1] == "cpu"


def test_a_wrong_result_is_said():
    row = {**OP_ROW, "error": None, "wrong": "the result holds NaN or infinity"}
    assert "WRONG: torch fp32: the result holds NaN or infinity" in table.render(result(row))


def test_columns_that_nothing_fills_are_left_out():
    row = {k: v for k, v in OP_ROW.items() if k not in ("gbs", "tflops", "floor_ms", "extra_bytes")}
    text = table.table([row])
    assert "GB/s" not in text and "extra MB" not in text and "median ms" in text


def test_a_training_row():
    text = table.render(result(STEP_ROW))
    assert cells(text, "lowrank") == [
        *("lowrank", "1.53", "1.50–1.60", "321", "2.50×", "640", "700", "3.2100", "2.1000"),
        "4.0e-04",
    ]


def test_a_training_row_that_counted_operations():
    row = {**STEP_ROW, "tflops": 0.05}
    add_rates([row], {"copy_gbs": 20.0, "read_gbs": 30.0, "matmul_tflops": 0.2})
    assert cells(table.render(result(row)), "lowrank")[4:8] == ["2.50×", "0.05", "25 %", "640"]


def test_cases_keep_the_order_of_the_run():
    other = {**OP_ROW, "case": "another"}
    grouped = table.cases([OP_ROW, other, {**OP_ROW, "contender": "x"}])
    assert [[row["contender"] for row in case] for case in grouped] == [
        ["torch fp32", "x"],
        ["torch fp32"],
    ]
