"""Run by `make sanitize` beside the tests: the library that they load is being watched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lowrank

# Two rows of a weight where `out` has room for one; what lies behind it may be anybody's.
TOO_FAR = """
import torch
from lowrank.ops.cpu.panels import dequantize_rows
weight = torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2, 1), None, torch.ones(1, 16)
dequantize_rows(weight, 32, 32, 0, {rows}, torch.empty(32))
"""
# So many rows that their number of bytes is no int64.
TOO_MANY = """
from lowrank.ops import native
native.load_cpu().lowrank_codebook_dequantize(
    64, 64, None, 64, 1, 1 << 62, 1 << 20, 64, 0, 1 << 62, 64, 0, 1
)
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(Path(lowrank.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_a_write_past_the_end_is_reported(tmp_path):
    done = run(TOO_FAR.format(rows=1), tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(TOO_FAR.format(rows=2), tmp_path)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr


def test_an_overflow_is_reported(tmp_path):
    done = run(TOO_MANY, tmp_path)
    assert done.returncode != 0 and "runtime error: signed integer overflow" in done.stderr
