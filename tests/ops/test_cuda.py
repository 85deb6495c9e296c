"""The CUDA library: it loads without a GPU, says why it cannot run, spills nothing; its results.

The results are tested on a GPU here, and without one in test_cuda_emulated.py.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

import lowrank
from lowrank import ops
from lowrank.ops import cuda as backend
from lowrank.ops import native, reference
from tests.ops.cuda_weights import ADAMW_SHAPES, DTYPES, allowed_error, cases, product
from tests.ops.interpreted_dequantize import random_weight
from tests.ops.interpreted_quantize import hard_weight

LIBRARY = Path(lowrank.__file__).parent / "lib" / "liblowrank_cuda.so"
HEADER = Path(__file__).resolve().parents[2] / "csrc" / "lowrank_cuda.h"
ARCHITECTURES = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
# 3 dtypes; M = 1, 2, 4, 8, 16 in float32 and M = 4, 8, 16 in two 16-bit dtypes; all dtypes in one.
KERNELS = {"dequantize": 3, "quantize": 3, "linear": 11, "adamw8bit": 1}
OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}

built = pytest.mark.skipif(
    not LIBRARY.exists(), reason="needs a GPU compiler: nvcc was not there when lowrank was built"
)


def cuobjdump(*options: str) -> str:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, *options, LIBRARY]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernel_named(symbol: str) -> str:
    """The kernel of a mangled name: the part behind the unnamed namespace, after its length."""
    return re.search(r"_cu_[0-9a-f]+(?:_\d+)?\d+?(dequantize|quantize|linear|adamw8bit)", symbol)[1]


def test_the_table_is_the_header():
    declared = dict(
        re.findall(
            r"LOWRANK_EXPORT (?:int32_t|const char\*) (\w+)\((.*?)\);",
            HEADER.read_text(),
            flags=re.DOTALL,
        )
    )
    assert declared.keys() == native.CUDA_FUNCTIONS.keys()
    kinds = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64}
    for name, arguments in declared.items():
        parts = [a.strip() for a in arguments.split(",") if a.strip() != "void"]
        expected = [ctypes.c_void_p if "*" in a else kinds[a.split()[0]] for a in parts]
        assert list(native.CUDA_FUNCTIONS[name]) == expected, name


def test_refuses_a_cpu_tensor_with_a_reason():
    x, weight = torch.zeros(1, 32), random_weight(1, 32, 32, False, False, None)
    said = backend.refuse("codebook_linear", x, *weight, None, 32)
    assert said == "runs on cuda tensors; got one on cpu"
    assert "got one on cpu" in backend.refuse("codebook_quantize", x, weight[-1], 32)
    assert "got one on cpu" in backend.refuse("adamw8bit_step", *([x] for _ in range(6)))


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU to be absent: it says why")
def test_loads_without_a_driver_and_says_why_it_cannot_run():
    reason = native.load_cuda()
    assert isinstance(reason, str) and reason.startswith("CUDA cannot be used: ")
    assert re.search("driver|device", reason)


@built
def test_no_kernel_spills_on_any_architecture():
    found: dict[str, Counter] = {}
    for part in cuobjdump("-res-usage").split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (sm_\d+)", part)[1]
        for symbol, usage in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", part):
            found.setdefault(arch, Counter())[kernel_named(symbol)] += 1
            used = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
            assert used["STACK"] == 0, (arch, symbol, usage)
            assert used["REG"] <= 255 and used["SHARED"] <= 48 << 10
    assert found == {arch: Counter(KERNELS) for arch in ARCHITECTURES}


@built
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_products_of_16_bit_x_run_on_tensor_cores_and_read_codes_8_bytes_at_once(arch):
    seen = Counter()
    for part in cuobjdump("-sass", "-arch", arch).split("Function : ")[1:]:
        symbol, code = part.split("\n", 1)
        if kernel_named(symbol) != "linear":
            continue
        dtype = "BF16" if "bfloat16" in symbol else "F16" if "half" in symbol else None
        products = set(re.findall(r"HMMA\.16816\.F32(\.BF16)?", code))
        seen[dtype] += 1
        assert products == {None: set(), "F16": {""}, "BF16": {".BF16"}}[dtype], symbol
        # Evict first, 64 bits: the codes. 128 bits: x.
        assert re.search(r"LDG\.E\.EF\.64", code) and re.search(r"LDG\.E\.128", code), symbol
        assert not re.search(r"\b(LDL|STL)\b", code)
    assert seen == {None: 5, "F16": 3, "BF16": 3}


def on_gpu(weight):
    return [t if t is None else t.cuda() for t in weight]


@pytest.fixture
def by_cuda():
    with ops.use_backend("cuda"):
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_on_a_gpu_equals_the_reference(dtype, generator, by_cuda):
    weights = [*cases(generator)]
    weights.append((300, 4096, 64, random_weight(300, 4096, 64, True, False, generator)))
    for _, K, G, weight in weights:
        got = ops.codebook_dequantize(*on_gpu(weight), K, G, dtype).cpu()
        assert torch.equal(got, reference.codebook_dequantize(*weight, K, G, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_row", [False, True])
def test_quantize_on_a_gpu_equals_the_reference(dtype, per_row, generator, by_cuda):
    for N, K in [(1, 1), (5, 33), (17, 63), (33, 123), (40, 4500), (1100, 96)]:
        for G in (32, 64, 256, 512, 4096):
            table = torch.rand(N if per_row else 1, 16, generator=generator) * 2 - 1
            weight = hard_weight(N, K, table, generator).to(dtype)
            weight[N // 2] *= 1e-39  # subnormal, or zeros
            want = reference.codebook_quantize(weight, table, G)
            for w in (weight.cuda(), weight.T.contiguous().cuda().T):
                got = ops.codebook_quantize(w, table.cuda(), G)
                assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [0, 1, 2, 3, 4, 7, 8, 9, 16])
def test_linear_on_a_gpu_is_within_its_bound_and_the_same_bits_twice(M, dtype, generator, by_cuda):
    for i, (N, K, G, weight) in enumerate(cases(generator)):
        x = torch.randn(M, K, generator=generator).to(dtype)
        bias = torch.randn(N, generator=generator).to(dtype) if i % 2 else None
        arguments = (x.cuda(), *on_gpu(weight), None if bias is None else bias.cuda(), G)
        y = ops.codebook_linear(*arguments)
        error = (y.cpu().double() - product(x, weight, K, G, bias)).abs()
        assert (error <= allowed_error(x, weight, K, G, bias)).all()
        assert torch.equal(y, ops.codebook_linear(*arguments))


@pytest.mark.gpu
def test_linear_replays_in_a_cuda_graph(generator, by_cuda):
    weight = random_weight(160, 224, 32, True, False, generator)
    device = on_gpu(weight)
    for M, dtype in ((1, torch.float32), (5, torch.bfloat16)):
        x = torch.randn(M, 224, generator=generator).cuda().to(dtype)
        ops.codebook_linear(x, *device, None, 32)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.codebook_linear(x, *device, None, 32)
        x.copy_(torch.randn(M, 224, generator=generator))
        graph.replay()
        error = (y.cpu().double() - product(x.cpu(), weight, 224, 32, None)).abs()
        assert (error <= allowed_error(x.cpu(), weight, 224, 32, None)).all()


@pytest.mark.gpu
def test_linear_addresses_codes_beyond_two_to_the_31_bytes(by_cuda):
    """The last rows of a weight of more than 2^31 bytes of codes are those of the rows alone."""
    if torch.cuda.mem_get_info()[0] < 4 << 30:
        pytest.skip("needs a GPU with 4 GB free")
    N, K = (1 << 20) + 3, 4096
    packed = torch.randint(256, (N, K // 2), dtype=torch.uint8, device="cuda")
    absmax, codebook = torch.rand(N, 1, device="cuda"), torch.randn(1, 16, device="cuda")
    for x in (torch.randn(2, K, device="cuda"), torch.randn(2, K, device="cuda").half()):
        y = ops.codebook_linear(x, packed, absmax, None, codebook, None, 4096)
        tail = ops.codebook_linear(x, packed[-5:], absmax[-5:], None, codebook, None, 4096)
        assert torch.equal(y[:, -5:], tail)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw8bit_on_a_gpu_equals_the_reference(dtype, generator, by_cuda):
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in ADAMW_SHAPES]
    ours = [[t.cuda() for t in (p, *ops.adamw8bit_state(p))] for p in params]
    for step in range(1, 7):
        spread = 10 ** (1.5 * torch.randn((), generator=generator).item() - 3)
        grads = [
            (torch.randn(p.shape, generator=generator).pow(3) * spread).to(dtype) for p in params
        ]
        theirs = [[t.cpu() for t in state] for state in ours]
        with ops.use_backend("reference"):
            take(theirs, grads, step)
        take(ours, [grad.cuda() for grad in grads], step)
        for got, expected in zip(ours, theirs, strict=True):
            # torch's square root may be one off in the last place, and so a parameter.
            off = torch.finfo(dtype).eps
            torch.testing.assert_close(got[0].cpu(), expected[0], rtol=off, atol=1e-8)
            for mine, its in zip(got[1:], expected[1:], strict=True):
                assert torch.equal(mine.cpu(), its)


def take(states, grads, step):
    params, *rest = zip(*states, strict=True)
    ops.adamw8bit_step(params, grads, *rest, step=step, **OPTIONS)
