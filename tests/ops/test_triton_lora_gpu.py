"""LoRA's Triton kernels on a CUDA device: against float64, as users call them, and their memory."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it to be deterministic

pytest.importorskip("triton")

from lowrank import ops  # noqa: E402
from lowrank.ops import reference  # noqa: E402
from lowrank.ops.reference.philox import kept  # noqa: E402
from tests.ops import interpreted_lora as cases  # noqa: E402
from tests.ops.interpreted_dequantize import random_weight  # noqa: E402

pytestmark = pytest.mark.gpu

# What the interpreter is too slow for: every tile of real widths, sums in many parts.
SHAPES = [*cases.SHAPES, (300, 520, 1040, 16, 1), (130, 1100, 96, 64, 4), (513, 257, 2049, 24, 1)]
SHAPES += [(64, 512, 4096, 16, 1), (16, 4096, 512, 8, 5), (200, 64, 64, 200, 1)]
# Beside 16-bit x, float32 operands are cut to TF32: 2^-10 of each; and y is rounded, its weight,
# and the branch before the base's product is added.
EXACT = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 1e-5)
TOLERANCE = {
    torch.float32: EXACT,
    torch.float16: {torch.float32: 2**-8, torch.float16: 2**-8},
    torch.bfloat16: {torch.float32: 2**-8, torch.bfloat16: 2**-7},
}


@pytest.fixture(autouse=True)
def exact_blas():
    """Products over scratch in true float32, and sums of 16-bit products in float32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    before_bf16 = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_bf16_reduced_precision_reduction = False
    yield
    matmul.allow_fp16_reduced_precision_reduction = before
    matmul.allow_bf16_reduced_precision_reduction = before_bf16


@pytest.fixture(autouse=True)
def on_triton():
    with ops.use_backend("triton"):
        yield


@pytest.fixture
def backend():
    from lowrank.ops.triton import lora

    return lora


def codes(N: int, K: int, generator: torch.Generator) -> list:
    return [t if t is None else t.cuda() for t in random_weight(N, K, 64, True, False, generator)]


def factors(R: int, N: int, K: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    A = torch.randn(1, R, K, device="cuda", dtype=dtype) * K**-0.5
    return A, torch.randn(1, N, R, device="cuda", dtype=dtype)


def peak_of(call) -> int:
    """Bytes at the peak of a call above those before it and those of its results."""
    call()  # compiled, and the scratch grown
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before - held
    del results
    return peak


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("base", cases.BASES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_near_float64_and_the_same_bits_twice(dtype, base, p, backend, generator):
    for i, shape in enumerate(SHAPES):
        case = cases.random_case(shape, base, dtype, p, generator).to("cuda")
        context = f"M, N, K, R, E = {shape} {base} {dtype} {p=} A {case.A.dtype}"
        made = cases.check_case(backend, case, TOLERANCE[dtype], context)
        if i % 4 == 0:
            cases.check_each_alone(backend, case, *made)


def test_drops_what_the_reference_drops(backend, generator):
    cases.check_masks(backend, generator, "cuda")
    cases.check_distant_masks(generator, "cuda")


def test_rows_without_an_adapter_and_no_rows(backend, generator):
    cases.check_rows_without_an_adapter(backend, generator, "cuda")
    cases.check_no_rows(backend, generator, "cuda")


def test_triton_is_what_runs_and_float64_is_refused(generator):
    A, B = factors(4, 8, 64, torch.float32)
    weight = codes(8, 64, generator)
    for dtype, said in ((torch.bfloat16, "triton: runs"), (torch.float64, "triton: refuses")):
        x = torch.ones(2, 64, device="cuda", dtype=dtype)
        rest = (None, 64, A, B, 1.0, None, None, 0.0, None)
        assert said in ops.explain("lora_linear", x, *weight, *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_agree_at_every_crossover(dtype, backend, generator):
    from lowrank.ops.triton.codebook import fused_rows

    most = fused_rows(torch.device("cuda"), dtype)
    for M, E in ((1, 1), (most, 1), (most, 3)):
        case = cases.random_case((M, 384, 512, 16, E), "codes", dtype, 0.2, generator).to("cuda")
        exact = reference.lora_linear(*case.exact(lambda t: t))
        bounds = reference.lora_linear(*case.exact(torch.abs))
        for way in (backend.lora_from_codes, backend.lora_through_blas):
            for got, want, bound in zip(way(*case.arguments()), exact, bounds, strict=True):
                cases.check(got, want, bound, TOLERANCE[dtype], f"{M=} {E=} {way.__name__}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its own compiler
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # left off: exact is what we test
@pytest.mark.parametrize("M", [1, 8, 128])
@pytest.mark.parametrize("E", [1, 3])
def test_compiles_as_one_graph_with_gradients(M, E, generator):
    N, K = 160, 224
    case = cases.random_case((M, N, K, 8, E), "codes", torch.float32, 0.25, generator).to("cuda")
    scale, order, offsets, p, seed = case.last
    groups = None if order is None else (order, offsets)
    inputs = [t.float().requires_grad_() for t in (case.x, case.A, case.B, case.bias)]

    def loss(x, A, B, bias, seed):
        y = ops.lora_linear(x, *case.base, bias, cases.G, A, B, scale, groups, p, seed)
        return y.square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    got = torch.autograd.grad(compiled(*inputs, seed), inputs)
    x, A, B, bias = (t.detach().double().requires_grad_() for t in inputs)
    rows, z = torch.arange(M, device="cuda"), x * kept(torch.arange(M).cuda(), K, p, seed) / (1 - p)
    y = x @ case.dense.double().T + bias
    bounds = [0, M] if order is None else offsets.tolist()
    for e in range(E):
        of_e = rows if order is None else order[bounds[e] : bounds[e + 1]].long()
        y = y.index_add(0, of_e, scale * z[of_e] @ A[e].T @ B[e].T)
    want = torch.autograd.grad(y.square().sum(), (x, A, B, bias))
    for gradient, exact in zip(got, want, strict=True):
        assert (gradient.double() - exact).norm() <= 1e-5 * exact.norm() + 1e-30


@pytest.mark.parametrize("E", [1, 3])
def test_replays_in_a_cuda_graph(E, generator):
    for M in (1, 8, 128):
        case = cases.random_case((M, 96, 160, 8, E), "codes", torch.float32, 0.0, generator)
        case = case.to("cuda")
        ids = torch.randint(-1, E, (M,), generator=generator).cuda()
        x = case.x.contiguous()

        def run(x=x, ids=ids, case=case):
            groups = ops.group_rows(ids, E) if E > 1 else None
            return ops.lora_linear(x, *case.base, case.bias, cases.G, case.A, case.B, 0.5, groups)

        run()  # compiled before it is captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        x.copy_(torch.randn(x.shape, generator=generator))
        ids.copy_(torch.randint(-1, E, (M,), generator=generator))  # regrouped on the device
        graph.replay()
        torch.testing.assert_close(y, run(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("base", ["dense", "codes"])
def test_holds_no_mask_and_no_copies(base, generator):
    """Beyond results and scratch: less than a bit an element of x forward, and a byte backward."""
    M, N, K, R, p = 4096, 2048, 4096, 16, 0.1
    x = torch.randn(M, K, device="cuda").bfloat16()
    dy = torch.randn(M, N, device="cuda").bfloat16()
    A, B = factors(R, N, K, torch.bfloat16)
    weight = codes(N, K, generator)
    if base == "dense":
        weight = [torch.randn(N, K, device="cuda").bfloat16(), None, None, None]
    seed = torch.tensor(3, device="cuda")
    last = (1.0, None, None, p, seed)

    def forward():
        return torch.ops.lowrank.lora_linear(x, *weight, None, 64, A, B, *last)

    _, h = forward()

    def backward():
        return torch.ops.lowrank.lora_linear_backward(
            dy, x, h, *weight, 64, A, B, *last, [True, True, True]
        )

    assert peak_of(forward) < M * K // 8
    assert peak_of(backward) < M * K


def test_rows_beyond_two_to_the_31_elements(backend):
    """Rows so far apart that 32-bit addresses wrap, and a mask whose counters pass 2^32."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs a GPU with 12 GB free")
    K, N, R, stride = 256, 64, 8, 1 << 30
    A, B = factors(R, N, K, torch.float32)
    buffer = torch.empty(4 * stride, device="cuda", dtype=torch.bfloat16)
    far = buffer.as_strided((4, K), (stride, 1))
    near = torch.randn(4, K, device="cuda").bfloat16()
    far.copy_(near)
    rest = (None, None, None, None, None, 64, A, B, 1.0, None, None, 0.0, None)
    for got, want in zip(
        backend.lora_linear(far, *rest), backend.lora_linear(near, *rest), strict=True
    ):
        assert torch.equal(got, want)
    dy = torch.randn(4, N, device="cuda").bfloat16()
    h = torch.randn(4, R, device="cuda")
    back = (h, None, None, None, None, 64, A, B, 1.0, None, None, 0.0, None, [True] * 3)
    for got, want in zip(
        backend.lora_linear_backward(dy, far, *back),
        backend.lora_linear_backward(dy, near, *back),
        strict=True,
    ):
        assert torch.equal(got, want)
    del buffer, far

    M, K = (1 << 18) + 8, 1 << 16  # x is one row, repeated by a stride of 0
    x, seed = torch.ones(1, K, device="cuda").expand(M, K), torch.tensor(5, device="cuda")
    A, B = torch.ones(1, 1, K, device="cuda"), torch.ones(1, 1, 1, device="cuda")
    _, h = backend.lora_linear(
        x, None, None, None, None, None, 64, A, B, 1.0, None, None, 0.5, seed
    )
    last = torch.arange(M - 8, M, device="cuda")
    want = 2.0 * kept(last, K, 0.5, seed).sum(1, keepdim=True)
    assert torch.equal(h[-8:], want)  # sums of ones: exact below 2^24
