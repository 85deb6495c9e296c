"""What is shipped: one top-level name, kernels/ in it, native libraries if there was a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Called as a build front end calls it; the isolation itself is what `make` installs with.
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])("dist"))
"""

# The reference at work: a weight there and back, with no native library in sight.
WORKS = """
import torch, lowrank
from lowrank import ops, quant
nf4 = quant.get("nf4", block_size=64, double_quant=True)
w = torch.randn(5, 123)
back = nf4.dequantize(nf4.quantize(w), torch.float32)
assert (back - w).abs().max() < 0.5 * w.abs().max(), (back - w).abs().max()
print(lowrank.__file__)
print(ops.explain("codebook_dequantize"))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clean copy of the sources: a build leaves nothing behind here, and finds nothing stale."""
    copy = tmp_path / "checkout"
    for name in ("lowrank", "kernels", "csrc"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    (copy / "tests").mkdir()
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    return copy


def build(kind: str, source: Path, mode: str = "auto", path: str = os.environ["PATH"]) -> Path:
    """The wheel or sdist of `source`; raises CalledProcessError with the whole output."""
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "NVCC", "PYTHONPATH")}
    env |= {"LOWRANK_BUILD": mode, "PATH": path}
    ran = subprocess.run(
        [sys.executable, "-c", BUILD, kind],
        cwd=source,
        env=env,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return source / "dist" / ran.stdout.split()[-1]


def run_installed(wheel: Path, code: str) -> str:
    """Runs `code` far from any checkout, with the unpacked wheel in front of everything else."""
    site = wheel.parent / "site"
    zipfile.ZipFile(wheel).extractall(site)
    env = {k: v for k, v in os.environ.items() if not k.startswith("LOWRANK_")} | {
        "PYTHONPATH": str(site)
    }
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=wheel.parent,
        env=env,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    assert str(site) in ran.stdout
    return ran.stdout


def contents(wheel: Path) -> tuple[list[str], list[str]]:
    """Names in the wheel, and the lines of its top_level.txt."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        top = next(n for n in names if n.endswith(".dist-info/top_level.txt"))
        return names, archive.read(top).decode().split()


def kernel_files() -> set[str]:
    return {
        f"lowrank/kernels/{f.relative_to(ROOT / 'kernels').as_posix()}"
        for f in (ROOT / "kernels").rglob("*.py")
    }


def data_files() -> set[str]:
    """What lies in lowrank/ beside Python and what was built or cached there."""
    ignored = {".py", ".pyc", ".so"}
    files = (f for f in (ROOT / "lowrank").rglob("*") if f.is_file() and f.suffix not in ignored)
    return {f.relative_to(ROOT).as_posix() for f in files}


def test_pure_wheel_holds_one_name_and_the_kernels(checkout):
    wheel = build("wheel", checkout, mode="skip")
    names, top = contents(wheel)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert top == ["lowrank"]
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"lowrank"}
    assert kernel_files() <= set(names)
    assert data_files() <= set(names)
    assert "lowrank/py.typed" in names and not any(n.endswith(".so") for n in names)
    with zipfile.ZipFile(wheel) as archive:  # the real one, not the checkout's shim
        shipped = archive.read("lowrank/kernels/__init__.py").decode()
    assert shipped == (ROOT / "kernels" / "__init__.py").read_text()


def test_sdist_builds_the_same_wheel(checkout):
    direct, _ = contents(build("wheel", checkout, mode="skip"))
    sdist = build("sdist", checkout, mode="skip")
    with tarfile.open(sdist) as archive:
        archive.extractall(checkout.parent, filter="data")
    unpacked = checkout.parent / sdist.name.removesuffix(".tar.gz")
    assert sorted(p.name for p in (unpacked / "csrc").iterdir()) == sorted(
        p.name for p in (checkout / "csrc").iterdir()
    )
    assert sorted(contents(build("wheel", unpacked, mode="skip"))[0]) == sorted(direct)


def test_without_a_compiler_it_installs_and_works(checkout):
    wheel = build("wheel", checkout, path="/nowhere")
    names, top = contents(wheel)
    assert top == ["lowrank"] and not any(n.endswith(".so") for n in names)
    assert "reference" in run_installed(wheel, WORKS)


def test_require_makes_a_missing_compiler_an_error(checkout):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        build("wheel", checkout, mode="require", path="/nowhere")
    assert "g++" in failed.value.stdout


def test_an_unknown_mode_is_refused(checkout):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        build("wheel", checkout, mode="yes")
    assert "LOWRANK_BUILD: expected auto, require or skip; got 'yes'" in failed.value.stdout


@pytest.mark.slow
def test_wheel_with_native_libraries(checkout):
    wheel = build("wheel", checkout, mode="require")
    names, top = contents(wheel)
    assert top == ["lowrank"]
    assert "-py3-none-" in wheel.name and "any" not in wheel.name
    assert "lowrank/lib/liblowrank_cpu.so" in names
    assert ("lowrank/lib/liblowrank_cuda.so" in names) == (shutil.which("nvcc") is not None)
    run_installed(wheel, WORKS + "\nassert ops.native.load_cpu().lowrank_abi() > 0")
