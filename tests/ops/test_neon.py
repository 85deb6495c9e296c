"""The NEON kernels, cross-compiled and run in an emulator, against the reference run here."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lowrank import ops
from lowrank.ops import adamw8bit, lion8bit, native, reference
from lowrank.ops.reference.philox import kept, threshold
from tests.ops.isas import needs_library
from tests.ops.weights import dense, random_weight

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++17", "-O3", "-static", "-fopenmp", "-ffp-contract=off", "-Wall", "-Werror"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What rounding alone does to a sum of float32 products, and then to the result in its dtype.
EPS = {torch.float32: 1e-6, torch.bfloat16: 2**-8 + 1e-6, torch.float16: 2**-11 + 1e-6}
SHAPES = [(1, 1), (5, 33), (9, 123), (17, 256), (3, 1100)]
BLOCK_SIZES = [32, 64, 512]

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)) or platform.machine() == "aarch64",
    reason=f"needs a CPU with neon, or {COMPILER} and {EMULATOR}",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The library and its driver as one program of the other processor."""
    folder = tmp_path_factory.mktemp("aarch64")
    sources = [f for f in sorted((ROOT / "csrc").glob("*.cpp")) if "_avx" not in f.stem]
    command = [COMPILER, *FLAGS, f"-I{ROOT / 'csrc'}", *sources]
    command += [ROOT / "tests" / "ops" / "cross_driver.cpp", "-o", folder / "driver"]
    subprocess.run(command, check=True, timeout=300)
    return folder / "driver"


@pytest.fixture(params=["generic", "neon"])
def call(driver, request):
    """call(function, numbers, inputs, outputs): fills `outputs`, in the emulator, on one ISA."""

    def run(function, numbers, inputs, outputs):
        command = [EMULATOR, driver, function, native.ISAS.index(request.param), *numbers]
        done = subprocess.run(
            [str(int(part) if isinstance(part, bool) else part) for part in command],
            input=b"".join(map(raw, inputs)),
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, (done.returncode, done.stderr)
        assert len(done.stdout) == sum(t.numel() * t.element_size() for t in outputs)
        at = 0
        for tensor in outputs:
            size = tensor.numel() * tensor.element_size()
            part = bytearray(done.stdout[at : at + size])
            tensor.copy_(torch.frombuffer(part, dtype=tensor.dtype).view(tensor.shape))
            at += size

    return run


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def weight_arguments(weight, K, block_size):
    packed, absmax, scale, codebook = weight
    numbers = (packed.shape[0], K, codebook.shape[0], block_size, scale is not None)
    return numbers, [t for t in weight if t is not None]


def weights():
    """(N, K, G, weight) of every block size and kind over ragged shapes."""
    for i, (N, K) in enumerate(SHAPES):
        for j, block_size in enumerate(BLOCK_SIZES):
            tables = N if (i + j) % 2 else 1
            yield N, K, block_size, random_weight(N, K, block_size, j % 2 == i % 2, tables)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_is_the_reference_to_the_bit(call, dtype):
    for N, K in SHAPES:
        for block_size in BLOCK_SIZES:
            w, codebook = torch.randn(N, K).to(dtype), torch.rand(1, 16) * 2 - 1
            expected = reference.codebook_quantize(w, codebook, block_size)
            got = tuple(torch.empty_like(t) for t in expected)
            numbers = (native.DTYPES[dtype], N, K, 1, block_size)
            call("quantize", numbers, [w, codebook], got)
            assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_the_reference_to_the_bit(call, dtype):
    for _, K, block_size, weight in weights():
        expected = reference.codebook_dequantize(*weight, K, block_size, dtype)
        got = torch.empty_like(expected)
        numbers, tensors = weight_arguments(weight, K, block_size)
        call("dequantize", (native.DTYPES[dtype], *numbers), tensors, [got])
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 2, 3, 8, 17])
def test_linear_is_as_near_as_rounding_allows(call, dtype, M):
    for N, K, block_size, weight in weights():
        x, y = torch.randn(M, K).to(dtype), torch.empty(M, N, dtype=dtype)
        numbers, tensors = weight_arguments(weight, K, block_size)
        call("linear", (native.DTYPES[dtype], M, *numbers), [*tensors, x], [y])
        w, x = dense(*weight, K, block_size).double(), x.double()
        allowed = EPS[dtype] * (x.abs() @ w.abs().T) + torch.finfo(dtype).smallest_normal
        assert ((y.double() - x @ w.T).abs() <= allowed).all()


@needs_library
@pytest.mark.parametrize("M", [1, 3, 5])
def test_linear_in_fixed_point_is_that_of_this_processor(call, M):
    for N, K, block_size, weight in weights():
        x, y = torch.randn(M, K), torch.empty(M, N)
        numbers, tensors = weight_arguments(weight, K, block_size)
        call("linear_int16", (native.DTYPES[x.dtype], M, *numbers), [*tensors, x], [y])
        w = dense(*weight, K, block_size)
        with ops.use_backend("cpu_int16"):
            expected = ops.codebook_linear(x, *weight, None, block_size)
        assert ((y - expected).abs() <= 2e-6 * (x.abs() @ w.abs().T) + 1e-30).all()


def test_softmax_and_its_gradient(call):
    for T, V in ((1, 1), (5, 2), (9, 63), (3, 1031)):
        z, labels = torch.randn(T, V) * 5, torch.randint(0, V, (T,))
        loss, gradient = torch.empty(T), torch.empty(T, V)
        call("softmax", (T, V), [z, labels], [loss, gradient])
        exact = z.double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
        (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_dropped_out_are_the_reference_to_the_bit(call, dtype, seed):
    M, p, inverse = 9, 0.3, torch.tensor(1 / 0.7)
    for K in (1, 63, 130):
        x, order = torch.randn(M, K).to(dtype), torch.tensor([7, 0, 3, 8], dtype=torch.int32)
        mask = kept(order, K, p, torch.tensor(seed))
        panel = torch.where(mask, x[order.long()].float() * inverse, 0)
        back = x.clone()
        back[order.long()] = (x[order.long()].float() + panel * inverse).to(dtype)
        got = torch.empty_like(panel), torch.empty_like(x)
        numbers = (native.DTYPES[dtype], M, K, len(order), seed, threshold(p))
        call("rows", numbers, [x, order, inverse[None]], got)
        assert torch.equal(got[0], panel) and torch.equal(got[1], back)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_turns_and_gates_are_as_near_as_rounding_allows(call, dtype):
    number, eps = native.DTYPES[dtype], 2 * EPS[dtype]
    for M, H in ((1, 1), (3, 37), (5, 130)):
        x, dy, weight = torch.randn(M, H).to(dtype), torch.randn(M, H).to(dtype), torch.randn(H)
        got = torch.empty_like(x), torch.empty_like(x), torch.empty(H)
        call("rms_norm", (number, M, H, 1), [x, weight, dy], got)
        x64, dy64, weight64 = x.double(), dy.double(), weight.double()
        y, rstd = reference.rms_norm(x64, weight64, 1e-5, True)
        gradients = reference.rms_norm_backward(dy64, x64, weight64, rstd, True, [True, True])
        for ours, right in zip(got, (y, *gradients), strict=True):
            assert ((ours - right).abs() <= eps * (right.abs() + 1)).all()
        for activation, name in enumerate(("silu", "gelu_tanh")):
            got = [torch.empty_like(x) for _ in range(3)]
            call("gated", (number, M, H, activation), [3 * x, dy, x], got)
            both = (3 * x).double(), dy64
            right = [reference.gated(*both, name), *reference.gated_backward(x64, *both, name)]
            for ours, exact in zip(got, right, strict=True):
                assert ((ours - exact).abs() <= eps * (exact.abs() + 1)).all()
    for D, turned, back in ((2, 2, 0), (37, 34, 1), (64, 64, 0)):
        x = torch.randn(1, 5, 2, D).to(dtype)
        cos, sin, y = torch.randn(1, 5, 1, turned), torch.randn(1, 5, 1, turned // 2), [x.clone()]
        call("rotate", (number, 5, 2, D, turned, back), [x, cos, sin], y)
        exact = x.double()
        right = reference.rotate(exact, exact, cos.double(), sin.double(), bool(back))[0]
        assert ((y[0] - right).abs() <= eps * (right.abs() + 4)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_lion8bit_is_the_reference_to_the_bit(call, dtype):
    numbers = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}
    for shape in ((5, 700), (40, 16), (3, 33)):
        p = torch.randn(shape).to(dtype)
        m, m_scale = ops.adamw8bit_state(p)[:2]
        for _ in range(3):
            grad = (torch.randn(shape) * torch.randn(shape)).to(dtype)
            grad[:, ::3] = 0
            got = [torch.empty_like(t) for t in (p, m, m_scale)]
            by = torch.tensor(lion8bit.coefficients(**numbers))
            inputs = [p, grad, m, m_scale, adamw8bit.dynamic_map(True), by]
            call("lion8bit", (native.DTYPES[dtype], *shape), inputs, got)
            with ops.use_backend("reference"):
                ops.lion8bit_step([p], [grad], [m], [m_scale], **numbers)
            assert all(map(torch.equal, got, (p, m, m_scale)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw8bit_is_the_reference_to_the_bit(call, dtype):
    numbers = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    maps = [adamw8bit.dynamic_map(True), adamw8bit.dynamic_map(False)]
    for shape in ((5, 700), (40, 16), (3, 33)):
        p = torch.randn(shape).to(dtype)
        m, m_scale, v, v_scale = ops.adamw8bit_state(p)
        for step in (1, 2, 3, 4):
            grad = (torch.randn(shape) * torch.randn(shape)).to(dtype)
            grad[:, ::3] = 0
            got = [torch.empty_like(t) for t in (p, m, v, m_scale, v_scale)]
            by = torch.tensor(adamw8bit.coefficients(**numbers, step=step))
            inputs = [p, grad, m, v, m_scale, v_scale, *maps, by]
            call("adamw8bit", (native.DTYPES[dtype], *shape), inputs, got)
            with ops.use_backend("reference"):
                ops.adamw8bit_step(
                    [p], [grad], [m], [m_scale], [v], [v_scale], **numbers, step=step
                )
            off = torch.finfo(dtype).eps  # as on every instruction set
            torch.testing.assert_close(got[0], p, rtol=off, atol=1e-8)
            assert all(map(torch.equal, got[1:], (m, v, m_scale, v_scale)))
