"""linear_cross_entropy on a CUDA device by Triton, against torch's in float64; and its memory."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it to be deterministic

pytest.importorskip("triton")

from lowrank import ops  # noqa: E402
from tests.ops.interpreted_cross_entropy import (  # noqa: E402
    DTYPES,
    SHAPES,
    check,
    exact,
    example,
    hard_logits,
    launched,
)

pytestmark = pytest.mark.gpu

# Two roundings, of the gradient and of dx, and those of float32 sums.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10 + 1e-5, torch.bfloat16: 2**-8 + 1e-5}
LARGE = [(300, 64, 1000), (700, 24, 50_257), (600, 32, 128_256), (40, 16, 262_144)]


@pytest.fixture(autouse=True)
def on_triton():
    with ops.use_backend("triton"):
        yield


def loss_and_dx(x, weight, labels):
    x = x.detach().requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, labels)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def test_triton_is_what_runs(generator):
    x, weight, labels = (t.cuda() for t in example(3, 8, 30, DTYPES[0], generator))
    assert "triton: runs" in ops.explain("linear_cross_entropy", x, weight, labels, True)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_loss_and_dx_are_near_float64_and_the_same_bits_twice(dtypes, generator):
    for T, H, V in SHAPES + LARGE:
        x, weight, labels = (t.cuda() for t in example(T, H, V, dtypes, generator))
        loss, dx = loss_and_dx(x, weight, labels)
        assert dx.dtype == x.dtype and loss.dtype == torch.float32
        check(loss, dx, exact(x, weight, labels), TOLERANCE[x.dtype])
        assert (dx[labels < 0] == 0).all()
        again = loss_and_dx(x, weight, labels)
        assert torch.equal(loss, again[0]) and torch.equal(dx, again[1])
        with torch.no_grad():
            assert torch.equal(ops.linear_cross_entropy(x, weight, labels), loss)


@pytest.mark.parametrize("dtype", DTYPES[0][:1] + DTYPES[1][:1] + DTYPES[2][:1])
@pytest.mark.parametrize("V", [63, 4096, 50_257, 128_256])
def test_no_logit_is_written_over_before_it_was_read(V, dtype, generator):
    """Every row of a full GPU, each logit's gradient: of 16 bits they share memory with logits."""
    for _ in range(3):
        z = torch.randn(512, V, generator=generator).mul_(4).cuda()
        labels = torch.randint(0, V, (512,), generator=generator).cuda()
        losses, gradient = launched(z.clone(), labels, dtype)
        expected = z.double().softmax(1)
        want = F.cross_entropy(z.double(), labels, reduction="none")
        torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-6)
        expected[torch.arange(512, device="cuda"), labels] -= 1
        rounding = TOLERANCE[dtype]
        least = 2.0**-25 if dtype == torch.float16 else 1e-7
        torch.testing.assert_close(gradient.double(), expected, rtol=rounding, atol=least)


def test_infinite_logits_and_nan(generator):
    z, labels = (t.cuda() for t in hard_logits(generator))
    want = F.cross_entropy(z.double(), labels, reduction="none")
    expected = z.double().softmax(1)
    expected[torch.arange(6, device="cuda"), labels] -= 1
    for dtype, rounding in TOLERANCE.items():
        losses, gradient = launched(z.clone(), labels, dtype)
        torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(
            gradient.double(), expected, rtol=rounding, atol=1e-7, equal_nan=True
        )


@pytest.mark.parametrize("H", [4096, 8192])
def test_a_vocabulary_of_128256_takes_less_than_300_mb(H):
    """Beside its inputs and dx, and beside the workspace that cuBLAS keeps."""
    if torch.cuda.mem_get_info()[0] < 4 << 30:
        pytest.skip("needs a GPU with 4 GB free")
    T, V = 2048, 128_256
    weight = torch.randn(V, H, dtype=torch.bfloat16, device="cuda") / H**0.5
    x = torch.randn(T, H, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    labels = torch.randint(0, V, (T,), device="cuda")
    for rows in (64, T):  # the first asks for the workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = ops.linear_cross_entropy(x[:rows], weight, labels[:rows])
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        assert loss.isfinite()
    assert peak - x.nbytes < 300e6


def test_more_than_two_to_the_31_logits_are_addressed(generator):
    """The rows at the end are those of the same logits by themselves."""
    V, rows = 131_072, (1 << 14) + 5
    if torch.cuda.mem_get_info()[0] < 4 * V * (rows + 64):
        pytest.skip("needs a GPU with 9 GB free")
    last = torch.randn(5, V, generator=generator).cuda()
    labels = torch.arange(rows, device="cuda") % V
    z = torch.zeros(rows, V, device="cuda")
    z[-5:] = last
    want, gradient = launched(last, labels[-5:], torch.bfloat16)
    losses, long = launched(z, labels, torch.bfloat16)
    assert torch.equal(losses[-5:], want) and torch.equal(long[-5:], gradient)
