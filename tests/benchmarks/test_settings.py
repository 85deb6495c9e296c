"""A comparison: peers that are missing, fail or do not fit are said, ours must not be."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch

from benchmarks import installed
from benchmarks.ceilings import floor_seconds, matmul_key
from benchmarks.errors import ContenderError, UsageError
from benchmarks.harness import Contender
from benchmarks.settings import Settings, add_rates
from benchmarks.shapes import SHAPES, layers_bytes, parse, parse_dtypes, parse_rows

CEILINGS = {"copy_gbs": 10.0, "read_gbs": 20.0, "matmul_tflops": 0.1, "matmul_bfloat16_tflops": 1.0}


def settings() -> Settings:
    made = Settings(["torch"], [], [1], {"fp32": torch.float32}, 0.01, 3, 1 << 20)
    made.ceilings = dict(CEILINGS)
    return made


def contender(name: str, fails: bool = False) -> Contender:
    def call(i: int) -> torch.Tensor:
        if fails:
            raise RuntimeError("no kernel\nfor this machine")
        return torch.zeros(1)

    return Contender(name, call, 2, lambda outputs: 0.0, moved=1000, flops=10)


def test_a_peer_that_fails_is_left_out_with_its_error(capsys):
    here = settings()
    sides = [contender("lowrank"), contender("torch", fails=True), contender("bitsandbytes")]
    rows = here.compare("codebook_linear", "a case", sides, "torch", "read")
    assert [row["contender"] for row in rows] == ["lowrank", "bitsandbytes"]
    assert {row["baseline"] for row in rows} == {"lowrank"}
    said = "codebook_linear a case: torch failed: RuntimeError: no kernel"
    assert here.notes == [said] and said in capsys.readouterr().out


def test_ours_that_fails_ends_the_run():
    with pytest.raises(ContenderError, match="lowrank fp32 failed"):
        settings().compare("x", "y", [contender("lowrank fp32", fails=True)], "torch", "read")


def test_a_comparison_larger_than_the_memory_is_left_out(capsys):
    here = settings()
    assert not here.fits("codebook_linear", "huge", 10**6, 10**6, 12)
    assert "codebook_linear huge needs about" in here.notes[0] and "left out" in here.notes[0]
    assert here.fits("codebook_linear", "small", 64, 64, 12)
    assert "codebook_linear small needs about 0.0 GB" in capsys.readouterr().out


def test_the_memory_of_layers_grows_with_what_they_hold():
    (N, K), working_set = SHAPES["llama3-70b.down"], 1 << 30
    # ten packed sides of the working set each, two dense ones of two copies, an oracle in float64
    assert 10e9 + 2 * 8 * N * K < layers_bytes(N, K, 12, working_set) < 21e9
    assert layers_bytes(64, 64, 12, 1 << 20) < 14 << 20


def test_rates_and_floors():
    row = {"moved": 2 * 10**9, "flops": 10**9, "memory": "read", "median_ms": 200.0}
    rows = [dict(row), {**row, "flops": 50 * 10**9, "dtype": "bfloat16"}]
    add_rates(rows, CEILINGS)
    assert (rows[0]["gbs"], rows[0]["tflops"]) == pytest.approx((10.0, 0.005))
    assert rows[0]["floor_ms"] == rows[0]["memory_floor_ms"] == pytest.approx(100)
    assert (rows[1]["floor_ms"], rows[1]["memory_floor_ms"]) == pytest.approx((100, 100))
    assert floor_seconds(CEILINGS, 0, 50 * 10**9, "copy") == pytest.approx(0.5)
    assert floor_seconds(CEILINGS, 0, 50 * 10**9, "copy", "bfloat16") == pytest.approx(0.05)
    assert matmul_key(torch.float32) == "matmul_tflops"


def test_named_shapes_are_those_of_the_models():
    for N, K in ((1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672)):
        label, *shape = parse(f"{N}x{K}")
        assert shape == [N, K] and "llama3" in label
    assert parse_dtypes("fp16,fp32,fp16") == {"fp16": "float16", "fp32": "float32"}
    assert parse_rows("1,8192,1") == [1, 8192]
    with pytest.raises(UsageError, match="fp32, bf16, fp16"):
        parse_dtypes("float32")


def test_who_is_missing_is_told_how_to_come(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("bitsandbytes", "torchao", "peft"):
        assert f"{name} is not installed: pip install" in installed.missing(name)
    assert "pip install --no-deps liger-kernel" in installed.missing("liger", "cuda")
    assert installed.missing("unsloth") == "it runs on CUDA devices only"
    assert installed.missing("torch") is installed.missing("dequantize") is None


def test_an_old_bitsandbytes_is_no_peer(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for version, old in (("0.49.2", True), ("0.50.1", True), ("0.50.2", False), ("1.0", False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, v=version: v)
        assert bool(installed.missing("bitsandbytes")) == old


def test_a_compiler_is_needed_to_compile(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler -O2")
    assert "/no/such/compiler" in installed.missing("compile")
