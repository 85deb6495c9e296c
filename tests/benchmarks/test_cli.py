"""The command line: help that can be pasted, mistakes in one line, and a small run to its end."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import machine, shapes
from benchmarks.cli import BENCHMARKS, EXAMPLES, main, parser
from benchmarks.gpu import cli as gpu
from benchmarks.installed import PEERS, missing

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_help_names_every_option_and_benchmark(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in (*BENCHMARKS, "--against", "--shapes", "--json", "--threads", "--isa", "--table"):
        assert name in text


def test_every_example_of_the_help_parses():
    lines = [line for line in EXAMPLES.splitlines() if "python -m benchmarks" in line]
    assert len(lines) >= 5
    for line in lines:
        command = line.split("python -m benchmarks")[1].split("   ")[0]
        given = parser().parse_args(shlex.split(command))
        assert all(name in BENCHMARKS for name in given.names)


def test_every_command_of_the_documentation_parses():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    commands = re.findall(r"python -m benchmarks(\.gpu)?((?: [^`#\n]*)?)[`#\n]", text)
    assert len(commands) >= 15
    for module, arguments in commands:
        parse, known = (gpu.parser, gpu.BENCHMARKS) if module else (parser, BENCHMARKS)
        given = parse().parse_args(shlex.split(arguments))
        assert all(name in known for name in given.names)


def test_every_benchmark_and_peer_is_documented():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert all(f"| `{name}` |" in text for name in BENCHMARKS)
    assert all(f"`{name}`" in text for name in PEERS)


def test_list_shows_benchmarks_and_shapes(capsys):
    assert main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*BENCHMARKS, *shapes.SHAPES, *shapes.HEADS, *PEERS))
    assert re.search(r"llama3-70b.down +8192x28672 +\d+ GB", text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["codebook_liner"], "codebook_linear"),
        (["--against", "tensorflow"], "bitsandbytes"),
        (["--shapes", "4096by4096"], "NxK"),
        (["--shapes", "0x64"], "NxK"),
        (["--rows", "1,x"], "--rows"),
        (["--dtypes", "fp8"], "fp16"),
        (["--heads", "llama3-8b.q"], "llama3-8b.head"),
        (["--seconds", "0"], "--seconds"),
        (["--steps", "1"], "--steps"),
        (["--working-set", "-1"], "--working-set"),
        (["--table", "no-such-file.json"], "no-such-file.json"),
        (["--isa", "avx2"], "torch is loaded already"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, said, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_file_without_results_is_refused(tmp_path, capsys):
    path = tmp_path / "other.json"
    for text in ("[]", '{"rows": []}', "{"):
        path.write_text(text)
        assert main(["--table", str(path)]) == 2
        assert str(path) in capsys.readouterr().err


def test_a_small_run_to_json_table_and_plot(tmp_path):
    path, png = tmp_path / "result.json", tmp_path / "linear.png"
    names = ["codebook_quantize", "codebook_dequantize", "codebook_linear", "adamw8bit"]
    names += ["linear_cross_entropy"]
    roofline = tmp_path / "roofline.png"
    done = run(
        *names,
        *("--shapes", "63x123", "192x576", "--rows", "1,128", "--seconds", "0.05"),
        *("--working-set", "1", "--against", "torch,unsloth", "--json", str(path)),
        *("--heads", "300x64", "--plot", str(png), "--roofline", str(roofline)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert {row["benchmark"] for row in result["rows"]} == set(names)
    for row in result["rows"]:
        assert row["n"] >= 5
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["error"] < 0.12
        assert "wrong" not in row
        assert row["gbs"] > 0 and row["tflops"] > 0
        assert row["floor_ms"] >= row["memory_floor_ms"] > 0
    linear = [row for row in result["rows"] if row["benchmark"] == "codebook_linear"]
    assert {row["contender"] for row in linear} == {
        *(f"{side} {dtype}" for side in ("lowrank", "torch") for dtype in ("fp32", "bf16")),
        "lowrank fp32, cpu_int16",
    }
    assert all(row["path"] for row in linear if row["contender"].startswith("lowrank"))
    assert sum("forward + dX" in row["case"] for row in linear) == 2 * 4
    entropy = [row for row in result["rows"] if row["benchmark"] == "linear_cross_entropy"]
    assert {row["contender"] for row in entropy} == {"lowrank", "torch", "torch, in chunks"}
    assert sum("half labelled" in row["case"] for row in entropy) == 2 * 3
    assert result["missing"] == {"unsloth": "it runs on CUDA devices only"}
    assert "without unsloth: it runs on CUDA devices only" in done.stdout
    assert png.read_bytes()[:4] == roofline.read_bytes()[:4] == b"\x89PNG"

    shown = run("--table", str(path))
    assert shown.returncode == 0, shown.stderr
    for row in result["rows"]:
        assert row["case"] in shown.stdout
    assert f"{result['ceilings']['copy_gbs']:.1f} GB/s" in shown.stdout


@pytest.mark.skipif("avx2" not in machine.cpu_flags(), reason="needs a CPU with AVX2")
def test_an_instruction_set_holds_for_the_run_and_is_recorded(tmp_path):
    path = tmp_path / "result.json"
    small = ("--shapes", "64x64", "--seconds", "0.05", "--working-set", "1", "--against", "none")
    done = run("codebook_quantize", *small, "--isa", "avx2", "--json", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["run"]["isa"] == "avx2"
    assert [row["path"] for row in result["rows"]] == ["cpu avx2"]


def test_a_benchmark_without_its_input_is_left_out_with_the_reason():
    done = run("training_step", "--working-set", "1", LOWRANK_SMOLLM2="/no/such.gguf")
    assert done.returncode == 2
    assert "training_step was left out: LOWRANK_SMOLLM2" in done.stdout


@pytest.mark.slow
def test_training_step_beside_its_peers(smollm2, data_dir, tmp_path):
    path = tmp_path / "result.json"
    done = run(
        *("training_step", "--steps", "3", "--json", str(path)),
        timeout=900,
        LOWRANK_SMOLLM2=str(smollm2),
        LOWRANK_TEST_DATA=str(data_dir),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 9 + (missing("trl") is None)
    for row in rows:
        assert row["layers"] == 210
        assert len(row["losses"]) == 3
        assert row["peak_bytes"] > 0
