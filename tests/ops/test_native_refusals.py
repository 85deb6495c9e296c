"""A native library that is absent, damaged, stale or another's is a reason, and never an error."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.ops import native
from lowrank.ops.dispatch import BACKENDS
from tests.ops.isas import needs_library

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "lowrank" / "lib"
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: install g++")

# What a user sees: every operator still gives the reference's result, and each line has a reason.
SCRIPT = """
import torch
from lowrank import ops
from lowrank.ops import reference
w, c = torch.randn(3, 100), torch.rand(1, 16)
got = ops.codebook_quantize(w, c)
assert all(map(torch.equal, got, reference.codebook_quantize(w, c, 64)))
weight = (got[0], got[1], None, c)
x = torch.randn(2, 100)
assert torch.equal(ops.codebook_linear(x, *weight), reference.codebook_linear(x, *weight, None, 64))
ops.codebook_linear(x.requires_grad_(), *weight).sum().backward()
print(ops.explain("codebook_quantize", w, c, 64))
print(ops.explain("codebook_dequantize"))
"""

# A library of the right names, each of which a test gives a body or leaves out.
ABI_CPU = 'extern "C" int lowrank_abi() { return %d; }\n'
ABI_CUDA = 'extern "C" int lowrank_cuda_abi() { return %d; }\n'


@pytest.fixture
def lib(tmp_path: Path) -> Path:
    """The folder of native libraries in a copy of the package, still empty."""
    shutil.copytree(ROOT / "lowrank", tmp_path / "lowrank", ignore=shutil.ignore_patterns("lib"))
    folder = tmp_path / "lowrank" / "lib"
    folder.mkdir()
    return folder


def explained(lib: Path) -> dict[str, str]:
    """backend -> what `explain` says of it, in the copy of the package that `lib` is in."""
    copy = lib.parents[1]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=copy,
        env={k: v for k, v in os.environ.items() if k not in ("LOWRANK_ISA", "LOWRANK_BACKEND")}
        | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    _, cpu, reference, _, *here = done.stdout.splitlines()
    found = dict(line.strip().split(": ", 1) for line in here)
    assert set(found) == set(BACKENDS), found  # each reason is one line
    assert cpu == f"  cpu: refuses: {found['cpu']}" and reference == "  reference: runs"
    return found


def compiled(source: str, to: Path) -> None:
    file = to.with_suffix(".cpp")
    file.write_text(source)
    subprocess.run([COMPILER, "-shared", "-fPIC", file, "-o", to], check=True, timeout=60)
    file.unlink()


def test_an_absent_library(lib):
    found = explained(lib)
    assert "liblowrank_cpu.so is not built; install a C++ compiler" in found["cpu"]
    assert "liblowrank_cuda.so is not built; install nvcc" in found["cuda"]


@pytest.mark.parametrize("content", [b"", b"not a library\n", b"\x7fELF" * 100])
def test_a_file_that_is_no_library(lib, content):
    for kind in ("cpu", "cuda"):
        (lib / f"liblowrank_{kind}.so").write_bytes(content)
    for reason in (explained(lib)[kind] for kind in ("cpu", "cuda")):
        assert "cannot be used" in reason and reason.endswith("; reinstall lowrank")


def test_a_folder_in_place_of_a_library(lib):
    (lib / "liblowrank_cpu.so").mkdir()
    assert "cannot be used" in explained(lib)["cpu"]


@needs_library
@pytest.mark.parametrize("left", [50, 4096, -1])
def test_a_library_cut_short(lib, left):
    """To open one, and to touch a page that the file does not have, would end the process."""
    whole = (LIB / "liblowrank_cpu.so").read_bytes()
    (lib / "liblowrank_cpu.so").write_bytes(whole[:left])
    assert "liblowrank_cpu.so is cut short" in explained(lib)["cpu"]


@needs_library
def test_a_library_of_another_processor(lib):
    library = bytearray((LIB / "liblowrank_cpu.so").read_bytes())
    library[18:20] = (0xF7, 0x00)  # e_machine of the ELF header: BPF, which nothing runs
    (lib / "liblowrank_cpu.so").write_bytes(library)
    reason = explained(lib)["cpu"]
    assert "cannot be used" in reason and reason.endswith("; reinstall lowrank")


@needs_compiler
@pytest.mark.parametrize("abi", [0, native.ABI + 1, -1])
def test_a_stale_library_is_refused_by_its_number_before_its_functions(lib, abi):
    """It lacks functions too, as an older one would: the number is what tells the user."""
    compiled(ABI_CPU % abi, lib / "liblowrank_cpu.so")
    compiled(ABI_CUDA % abi, lib / "liblowrank_cuda.so")
    for kind, reason in explained(lib).items():
        if kind in ("cpu", "cuda"):
            assert f"expected ABI {native.ABI}; got {abi}; reinstall lowrank" in reason


@needs_compiler
@pytest.mark.parametrize("missing", ["lowrank_abi", "lowrank_codebook_linear"])
def test_a_library_without_one_of_the_functions(lib, missing):
    """Nothing in it is called but the number, or dividing by zero would end the process."""
    names = {name for name in native.FUNCTIONS if name not in ("lowrank_abi", missing)}
    source = "".join(f'extern "C" int {name}() {{ __builtin_trap(); }}\n' for name in names)
    if missing != "lowrank_abi":
        source += ABI_CPU % native.ABI
    compiled(source, lib / "liblowrank_cpu.so")
    reason = explained(lib)["cpu"]
    assert re.search(rf"cannot be used: .*undefined symbol: {missing}; reinstall", reason), reason
