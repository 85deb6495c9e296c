"""The memory of test_cpu_bounds.py is what it says: the byte after the last ends the process."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import ctypes, torch
from tests.ops.guarded import guarded
t = guarded(torch.arange(7, dtype=torch.int16))
assert t.tolist() == list(range(7)) and t.data_ptr() % 4 == 2
print(ctypes.c_ubyte.from_address(t.data_ptr() + {offset}).value, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a CPU with Linux's mprotect")
def test_reading_on_ends_the_process():
    for offset, status, printed in ((12, 0, "6\n"), (14, -signal.SIGSEGV, "")):
        done = subprocess.run(
            [sys.executable, "-c", CODE.format(offset=offset)],
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (status, printed), done.stderr
