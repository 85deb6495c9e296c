"""The Triton kernels without a GPU: interpreted against the reference, compiled to real cubins."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = [80, 90]


def test_interpreted_dequantize_equals_the_reference(seed):
    ran = subprocess.run(
        [sys.executable, "-m", "tests.ops.interpreted_dequantize", str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "96 cases equal\n"


def compile_offline(kernel, signature: dict, constants: dict, arch: int, cache: Path, monkeypatch):
    """Compiles `kernel` to a cubin with no GPU; returns Triton's compiled kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    names = list(signature)
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(n),): [["tt.divisibility", 16]]
            for n in ("packed_ptr", "out_ptr")
            if n in names
        },
    )
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def stack_bytes(compiled, folder: Path) -> int:
    """Bytes of local memory a thread of the cubin needs: anything but 0 is a spill."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("out", ["fp32", "fp16", "bf16"])
def test_dequantize_compiles_without_spills(arch, double_quant, out, tmp_path, monkeypatch):
    from lowrank.kernels.codebook_dequantize import codebook_dequantize_kernel

    signature = {
        "packed_ptr": "*u8",
        "absmax_ptr": "*u8" if double_quant else "*fp32",
        "scale_ptr": "*fp32" if double_quant else "constexpr",
        "codebook_ptr": "*fp32",
        "out_ptr": f"*{out}",
        "K": "i32",
        "row_bytes": "i32",
        "blocks": "i32",
        "codebook_stride": "i32",
        "G": "constexpr",
        "BLOCK_K": "constexpr",
    }
    constants = {"G": 64, "BLOCK_K": 1024} | ({} if double_quant else {"scale_ptr": None})
    compiled = compile_offline(
        codebook_dequantize_kernel, signature, constants, arch, tmp_path, monkeypatch
    )
    assert stack_bytes(compiled, tmp_path) == 0
    ptx = compiled.asm["ptx"]
    assert "fma.rn.f32" not in ptx  # code * step + offset rounds twice
    if out != "fp32":
        assert re.search(rf"cvt\.rn\.{out.replace('fp', 'f')}", ptx)


def test_refuses_a_cpu_tensor_with_a_reason():
    from lowrank.ops import triton as backend

    assert (
        backend.refuse("codebook_linear", torch.zeros(1)) == "runs on CUDA tensors; got one on cpu"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantize_on_a_gpu_equals_the_reference(dtype, double_quant, generator):
    from lowrank.ops import reference
    from lowrank.ops import triton as backend
    from tests.ops.interpreted_dequantize import BLOCKS, SHAPES, random_weight

    for N, K in [*SHAPES, (300, 4096)]:
        for G in BLOCKS:
            weight = random_weight(N, K, G, double_quant, per_row=False, g=generator)
            on_gpu = [t if t is None else t.cuda() for t in weight]
            got = backend.codebook_dequantize(*on_gpu, K, G, dtype).cpu()
            assert torch.equal(got, reference.codebook_dequantize(*weight, K, G, dtype))
