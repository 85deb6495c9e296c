"""Every Triton kernel compiles to real cubins with no GPU: no spills, tensor cores where meant."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")

from benchmarks import compile_all, kernel_cases  # noqa: E402

ARCHITECTURES = [80, 90]
CASES = list(kernel_cases.cases())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Triton's cache in a folder of its own: what is tested was compiled here and now."""
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield folder


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.dtype}")
def test_compiles_without_spills_and_with_tensor_cores(case, arch, cache):
    used = compile_all.compile_case(case, arch, cache)
    assert compile_all.faults(case, used) == []
    if "dequantize" in case.name or "adamw" in case.name:
        assert "fma.rn.f32" not in used.ptx  # each operation rounds by itself
    if "dequantize" in case.name and case.dtype != "fp32":
        assert re.search(rf"cvt\.rn\.{case.dtype.replace('fp', 'f')}", used.ptx)


def test_large_tiles_use_the_matrix_units_of_hopper(cache):
    """wgmma, which reads its operands from shared memory, where a tile has 64 rows."""
    for name in ("codebook_linear M=64 G=64", "codebook_linear_dx M=64 G=64"):
        case = next(c for c in CASES if c.name == name and c.dtype == "bf16")
        assert "wgmma" in compile_all.compile_case(case, 90, cache).ptx


def test_every_kernel_is_among_the_cases():
    from pathlib import Path

    import lowrank.kernels

    defined = set()
    for file in Path(lowrank.kernels.__path__[0]).glob("*.py"):
        defined |= set(re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE))
    compiled = {case.kernel.__name__ for case in CASES}
    assert compiled == defined
