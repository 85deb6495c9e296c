"""Every Triton operator on a CUDA device: against the reference and float64, as users call it."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it to be deterministic

pytest.importorskip("triton")

from lowrank import ops  # noqa: E402
from lowrank.ops import reference  # noqa: E402
from tests.ops.interpreted_dequantize import random_weight  # noqa: E402
from tests.ops.interpreted_quantize import hard_weight  # noqa: E402

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = [32, 64, 256, 4096]
SHAPES = [(1, 1), (3, 63), (9, 123), (257, 2049), (1100, 96), (512, 4096)]
ROWS = [0, 1, 2, 5, 16, 17, 32, 33, 64, 65, 300]
# Roundings of the weight and of the result, 2^-11 or 2^-9 each, and those of a float32 sum.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10 + 1e-5, torch.bfloat16: 2**-8 + 1e-5}


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


def cuda_weight(N, K, G, double_quant, per_row, generator):
    """The tensors of a weight on the GPU, and the values it stands for in float64 there."""
    weight = random_weight(N, K, G, double_quant, per_row, generator)
    dense = reference.codebook_dequantize(*weight, K, G, torch.float32).double()
    return [t if t is None else t.cuda() for t in weight], dense.cuda()


def check(got, exact, bound):
    assert got.shape == exact.shape and torch.isfinite(got).all()
    allowed = TOLERANCE[got.dtype] * bound + torch.finfo(got.dtype).smallest_normal
    error = (got.double() - exact).abs()
    assert (error <= allowed).all(), (error / bound.clamp(min=1e-30)).max().item()


def test_triton_is_what_runs():
    weight = [t if t is None else t.cuda() for t in random_weight(8, 64, 64, True, False, None)]
    said = ops.explain("codebook_linear", torch.ones(2, 64, device="cuda"), *weight, None, 64)
    assert "triton: runs" in said, said


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_dequantize_equals_the_reference(dtype, double_quant, per_row, generator):
    for N, K in SHAPES:
        for G in BLOCKS:
            weight = random_weight(N, K, G, double_quant, per_row, generator)
            on_gpu = [t if t is None else t.cuda() for t in weight]
            got = ops.codebook_dequantize(*on_gpu, K, G, dtype).cpu()
            assert torch.equal(got, reference.codebook_dequantize(*weight, K, G, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_row", [False, True])
def test_quantize_equals_the_reference(dtype, per_row, generator):
    for N, K in SHAPES:
        for G in BLOCKS:
            table = torch.rand(N if per_row else 1, 16, generator=generator) * 2 - 1
            weight = hard_weight(N, K, table, generator).to(dtype)
            weight[N // 2] *= 1e-39  # subnormal, or zeros
            want = reference.codebook_quantize(weight, table, G)
            got = ops.codebook_quantize(weight.cuda(), table.cuda(), G)
            strided = ops.codebook_quantize(weight.T.contiguous().cuda().T, table.cuda(), G)
            for a, b, c in zip(got, strided, want, strict=True):
                assert torch.equal(a.cpu(), c) and torch.equal(b.cpu(), c)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", ROWS)
def test_products_are_near_float64_and_the_same_bits_twice(M, dtype, generator):
    for i, (N, K) in enumerate(SHAPES):
        G = BLOCKS[
            (i + M) % len(BLOCKS)
        ]  # each block size is a kernel to compile: not all with all
        weight, w = cuda_weight(N, K, G, i % 2 == 0, i % 3 == 0, generator)
        x = torch.randn(2 * M, 2 * K, generator=generator).cuda().to(dtype)[::2, 1::2]
        bias = torch.randn(N, generator=generator).cuda().to(dtype) if i % 2 else None
        y = ops.codebook_linear(x, *weight, bias, G)
        b = torch.zeros(N, device="cuda") if bias is None else bias
        bound = x.double().abs() @ w.abs().T + b.double().abs()
        check(y, x.double() @ w.T + b.double(), bound)
        assert torch.equal(y, ops.codebook_linear(x, *weight, bias, G))

        dy = torch.randn(N, M, generator=generator).cuda().to(dtype).T
        dx = ops.codebook_linear_dx(dy, *weight, K, G)
        check(dx, dy.double() @ w, dy.double().abs() @ w.abs())
        assert torch.equal(dx, ops.codebook_linear_dx(dy, *weight, K, G))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_and_through_scratch_agree_at_every_crossover(dtype, generator):
    from lowrank.ops.triton import codebook as backend

    weight, w = cuda_weight(384, 1024, 64, True, False, generator)
    most = backend.fused_rows(torch.device("cuda"), dtype)
    assert 1 <= most <= 64
    for M in {1, most}:
        x = torch.randn(M, 1024, generator=generator).cuda().to(dtype)
        dy = torch.randn(M, 384, generator=generator).cuda().to(dtype)
        for product in (backend.linear_from_codes, backend.linear_through_scratch):
            check(product(x, *weight, None, 64), x.double() @ w.T, x.double().abs() @ w.abs().T)
        for product in (backend.dx_from_codes, backend.dx_through_scratch):
            check(product(dy, *weight, 1024, 64), dy.double() @ w, dy.double().abs() @ w.abs())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, in its own compiler
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # left off: exact is what we test
@pytest.mark.parametrize("M", [1, 8, 128])
def test_compiles_as_one_graph_with_gradients(M, generator):
    weight, w = cuda_weight(160, 224, 32, True, False, generator)
    x = torch.randn(M, 224, generator=generator).cuda().requires_grad_()
    bias = torch.randn(160, generator=generator).cuda().requires_grad_()

    def loss(x, bias):
        return ops.codebook_linear(x, *weight, bias, 32).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    got = torch.autograd.grad(compiled(x, bias), (x, bias))
    dy = 2 * (x.detach().double() @ w.T + bias.detach().double())
    for gradient, exact in zip(got, (dy @ w, dy.sum(0)), strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-3)


def test_replays_in_a_cuda_graph(generator):
    weight, w = cuda_weight(160, 224, 32, True, False, generator)
    for M in (1, 8, 128):
        x = torch.randn(M, 224, generator=generator).cuda()
        ops.codebook_linear(x, *weight, None, 32)  # compiled before it is captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.codebook_linear(x, *weight, None, 32)
        x.copy_(torch.randn(M, 224, generator=generator))
        graph.replay()
        check(y, x.double() @ w.T, x.double().abs() @ w.abs().T)


def test_two_streams_do_not_share_a_scratch(generator):
    weights = [cuda_weight(512, 512, 64, True, False, generator) for _ in range(2)]
    x = torch.randn(256, 512, generator=generator).cuda()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in weights]
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for stream, (weight, _), made in zip(streams, weights, results, strict=True):
            with torch.cuda.stream(stream):
                made.append(ops.codebook_linear(x, *weight, None, 64))
    torch.cuda.synchronize()
    for (_, w), made in zip(weights, results, strict=True):
        for y in made:
            check(y, x.double() @ w.T, x.double().abs() @ w.abs().T)


def test_codes_beyond_two_to_the_31_bytes_are_addressed():
    """The last rows of a weight of more than 2^31 bytes of codes are those of the rows alone."""
    if torch.cuda.mem_get_info()[0] < 4 << 30:
        pytest.skip("needs a GPU with 4 GB free")
    N, K = (1 << 20) + 3, 4096
    packed = torch.randint(256, (N, K // 2), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(N, 1, device="cuda")
    codebook = torch.randn(1, 16, device="cuda")
    x = torch.randn(2, K, device="cuda")
    for rows in (x[:1], x):
        y = ops.codebook_linear(rows, packed, absmax, None, codebook, None, 4096)
        tail = ops.codebook_linear(rows, packed[-5:], absmax[-5:], None, codebook, None, 4096)
        torch.testing.assert_close(y[:, -5:], tail, rtol=1e-5, atol=1e-4)
