"""The GPU suite on the CPU, by the clock: every case is formed, checked and timed as on a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu, gpu_timing


def test_every_case_has_its_rows_and_is_right(capsys):
    cpu = torch.device("cpu")
    result = gpu.run(cpu, [("64x96", 64, 96)], [1, 3], torch.float32, seconds=0.01, scale=1e-4)
    assert json.loads(json.dumps(result)) == result
    rows = result["rows"]
    assert not [row["wrong"] for row in rows if "wrong" in row]
    assert {(row["benchmark"], row["case"], row["contender"]) for row in rows} == {
        ("codebook_quantize", "64x96", "lowrank"),
        ("codebook_dequantize", "64x96", "torch copy"),
        ("codebook_dequantize", "64x96", "lowrank"),
        *(
            ("codebook_linear", f"64x96 M={M} {direction}", contender)
            for M in (1, 3)
            for direction in ("forward", "dX")
            for contender in ("torch", "lowrank")
        ),
    }
    for row in rows:
        assert row["n"] >= 10 and row["moved"] > 0 and row["floor_ms"] > 0
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    assert "### codebook_linear: 64x96 M=3 dX" in capsys.readouterr().out


def test_a_wrong_result_is_said_to_be_wrong():
    from benchmarks.harness import Contender, relative_error

    exact = torch.ones(4, dtype=torch.float64)
    calls = [
        Contender(
            "off", lambda i: torch.full((4,), 1.5), 2, lambda y: relative_error(y, exact), 0.1
        ),
        Contender("nan", lambda i: torch.empty(4), 2, lambda y: relative_error(y, exact), 0.1),
    ]
    off, empty = gpu_timing.measure(calls, 0.001, torch.device("cpu"))
    assert "5.00e-01" in off["wrong"] and "wrong" in empty


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU to be absent: it says so")
def test_says_when_there_is_no_device(capsys):
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
