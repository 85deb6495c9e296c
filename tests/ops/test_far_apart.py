"""More than 2^31 elements: rows that lie that far apart, and weights that many rows long.

At the boundary by strides and in sparse memory: nothing here takes more than megabytes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowrank import ops
from lowrank.ops.cpu.panels import dequantize_rows
from tests.ops.isas import ISAS, needs_library, running_on
from tests.ops.sparse import rows_apart, sparse
from tests.ops.weights import dense, random_weight

ROOT = Path(__file__).resolve().parents[2]
# Row 2 is beyond 2^31, and each stride is: products and strides that int32 does not hold.
STRIDES = [3 << 29, (1 << 31) + 7]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a CPU with Linux's mmap")


@pytest.fixture(params=["reference", None], ids=["reference", "best"])
def backend(request):
    with ops.use_backend(request.param):
        yield


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", STRIDES)
def test_quantize_of_rows_far_apart(isa, stride):
    codebook = torch.rand(1, 16) * 2 - 1
    for dtype in DTYPES:
        weight = torch.randn(3, 123).to(dtype)
        with running_on(isa):
            got = ops.codebook_quantize(rows_apart(weight, stride), codebook, 32)
        with ops.use_backend("reference"):
            expected = ops.codebook_quantize(weight, codebook, 32)
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_far_apart(backend, dtype, stride):
    weight = random_weight(9, 123, 32, double_quant=True)
    for M in (3, 20):
        x, dy = torch.randn(M, 123).to(dtype), torch.randn(M, 9).to(dtype)
        # Not the same bits: BLAS takes no such stride, and torch has another product then.
        near = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
        y = ops.codebook_linear(x, *weight, None, 32)
        far = ops.codebook_linear(rows_apart(x, stride), *weight, None, 32)
        torch.testing.assert_close(far, y, **near)
        dx = ops.codebook_linear_dx(dy, *weight, 123, 32)
        far = ops.codebook_linear_dx(rows_apart(dy, stride), *weight, 123, 32)
        torch.testing.assert_close(far, dx, **near)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_of_rows_far_apart(backend, dtype, stride):
    x, head = torch.randn(5, 12).to(dtype), torch.randn(20, 12).to(dtype)
    labels = torch.tensor([3, -100, 19, 0, 7])

    def loss_and_gradient(x, head):
        x = x.detach().requires_grad_()
        loss = ops.linear_cross_entropy(x, head, labels)
        return loss, torch.autograd.grad(loss, x)[0]

    expected = loss_and_gradient(x, head)
    for far in ((rows_apart(x, stride), head), (x, rows_apart(head, stride))):
        for got, wanted in zip(loss_and_gradient(*far), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantize_at_the_far_end_of_a_weight(isa, double_quant):
    """2^31 rows: 34 GB of codes, a table for each row, scales and codes of scales beside them."""
    N, K, rows = (1 << 31) + 100, 60, 7
    part = random_weight(rows, K, 32, double_quant, tables=rows)
    far = [None if t is None else sparse(N, t.shape[1], dtype=t.dtype) for t in part]
    for whole, few in zip(far, part, strict=True):
        if whole is not None:
            whole[-rows:] = few
    expected = dense(*part, K, 32)
    with running_on(isa):
        for dtype in DTYPES:
            out = torch.empty(rows, K, dtype=dtype)
            dequantize_rows(tuple(far), K, 32, N - rows, N, out)
            assert torch.equal(out, expected.to(dtype))


@needs_library
@pytest.mark.parametrize("backend", ["cpu", "cpu_int16"])
def test_linear_over_more_than_2_to_31_bytes_of_codes(backend):
    """All of the weight is read, on the fastest kernels: 2^32 zeros, and what is at the end."""
    K, rows, G = 1 << 15, 3, 4096
    N = (1 << 17) + rows
    part = random_weight(rows, K, G)
    packed, absmax = sparse(N, K // 2, dtype=torch.uint8), torch.zeros(N, K // G)
    packed[-rows:], absmax[-rows:] = part[0], part[1]
    x = torch.randn(1, K)
    w = dense(*part, K, G).double()
    with ops.use_backend(backend):
        y = ops.codebook_linear(x, packed, absmax, None, part[3], None, G)
    assert (y[:, :-rows] == 0).all()
    bound = 4e-6 if backend == "cpu" else 1e-3
    error = (y[:, -rows:].double() - x.double() @ w.T).abs()
    assert (error <= bound * (x.double().abs() @ w.abs().T)).all()


def test_interpreted_kernels_address_rows_far_apart(seed):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.interpreted_far_apart", str(seed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4 cases right\n"
