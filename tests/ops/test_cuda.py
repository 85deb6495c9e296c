"""The CUDA C++ kernels without a GPU: the library loads, says why it cannot run, spills nothing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

import lowrank
from lowrank.ops import cuda as backend
from lowrank.ops import native, reference
from tests.ops.interpreted_dequantize import BLOCKS, SHAPES, random_weight

LIBRARY = Path(lowrank.__file__).parent / "lib" / "liblowrank_cuda.so"

built = pytest.mark.skipif(
    not LIBRARY.exists(), reason="needs a GPU compiler: nvcc was not there when lowrank was built"
)


def test_refuses_a_cpu_tensor_with_a_reason():
    assert (
        backend.refuse("codebook_linear", torch.zeros(1)) == "runs on CUDA tensors; got one on cpu"
    )


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU to be absent: it says why")
def test_loads_without_a_driver_and_says_why_it_cannot_run():
    reason = native.load_cuda()
    assert isinstance(reason, str) and reason.startswith("CUDA cannot be used: ")
    assert re.search("driver|device", reason)


@built
def test_no_kernel_spills():
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", LIBRARY], capture_output=True, text=True, check=True
    )
    stacks = re.findall(r"STACK:(\d+)", usage.stdout)
    assert len(stacks) >= 3 and set(stacks) == {"0"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantize_on_a_gpu_equals_the_reference(dtype, double_quant, generator):
    for N, K in [*SHAPES, (300, 4096)]:
        for G in BLOCKS:
            weight = random_weight(N, K, G, double_quant, per_row=True, g=generator)
            on_gpu = [t if t is None else t.cuda() for t in weight]
            assert backend.refuse("codebook_dequantize", *on_gpu, K, G, dtype) is None
            got = backend.codebook_dequantize(*on_gpu, K, G, dtype).cpu()
            assert torch.equal(got, reference.codebook_dequantize(*weight, K, G, dtype))
