"""The GPU suite on the CPU, by the clock: every case is formed, checked and timed as on a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import table
from benchmarks.gpu import cli, timing


def test_every_case_has_its_rows_and_is_right(capsys):
    cpu = torch.device("cpu")
    shapes, rows_of_x = [("64x96", 64, 96)], [3, 128]
    heads, names = [("90x32", 90, 32)], list(cli.BENCHMARKS)
    result = cli.run(
        names, ["torch"], cpu, shapes, heads, rows_of_x, torch.float32, seconds=0.01, scale=1e-4
    )
    assert json.loads(json.dumps(result)) == result
    rows = result["rows"]
    assert not [row["wrong"] for row in rows if "wrong" in row]
    sides: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        sides.setdefault((row["benchmark"], row["case"]), set()).add(row["contender"])
    both, chunked = {"torch", "lowrank"}, {"torch", "torch, in chunks", "lowrank"}
    adapted = {"torch, frozen", "lowrank"}, {"lowrank, frozen", "lowrank"}
    assert sides == {
        ("codebook_quantize", "64x96 from fp32"): {"lowrank"},
        ("codebook_dequantize", "64x96 to fp32"): {"lowrank", "torch, dense copy"},
        **{
            ("codebook_linear", f"64x96 M={M} {direction}"): both
            for M in rows_of_x
            for direction in ("forward", "dX")
        },
        **{
            ("lora_linear", f"64x96 M=128 over {base} fp32, {direction}"): names
            for base, names in zip(("dense", "NF4"), adapted, strict=True)
            for direction in ("forward", "forward + backward")
        },
        **{
            ("lora_few_rows", f"64x96 M={M}, {adapters}"): names
            for M in rows_of_x
            for adapters, names in (
                ("one adapter", {"torch, frozen", "torch", "lowrank"}),
                ("8 adapters", {"torch, frozen", "lowrank"}),
            )
        },
        **{
            ("linear_cross_entropy", f"90x32 fp32 T=128, {share} labelled forward + dX"): chunked
            for share in ("all", "half")
        },
        **{
            ("adamw8bit", f"{what}64x96 fp32"): {"lowrank", "torch fused fp32"}
            for what in ("", "LoRA r=16 of 224 ")
        },
    }
    for row in rows:
        assert row["n"] >= 10 and row["moved"] > 0 and row["floor_ms"] > 0
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    printed = capsys.readouterr().out
    assert "### codebook_linear: 64x96 M=3 dX" in printed
    for case in table.cases(rows):
        assert table.titled(case) in printed and table.titled(case) in table.render(result)


def test_a_wrong_result_is_said_to_be_wrong():
    from benchmarks.harness import Contender, relative_error

    exact = torch.ones(4, dtype=torch.float64)
    calls = [
        Contender(
            "off", lambda i: torch.full((4,), 1.5), 2, lambda y: relative_error(y, exact), 0.1
        ),
        Contender("nan", lambda i: torch.empty(4), 2, lambda y: relative_error(y, exact), 0.1),
    ]
    off, empty = timing.measure(calls, 0.001, torch.device("cpu"))
    assert "5.00e-01" in off["wrong"] and "wrong" in empty


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["codebook_liner"], "codebook_linear"),
        (["--shapes", "4096by4096"], "NxK"),
        (["--rows", "x"], "--rows"),
        (["--against", "tensorflow"], "bitsandbytes"),
        (["--seconds", "0"], "--seconds"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, said, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU to be absent: it says so")
def test_says_when_there_is_no_device(capsys):
    assert cli.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
