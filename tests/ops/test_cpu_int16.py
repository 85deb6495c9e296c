"""Few rows of x in 16-bit fixed point, on every instruction set: as near as the rounding allows."""

import pytest
import torch

import lowrank
from lowrank import ops
from tests.ops.isas import ISAS, needs_library, running_on, using_threads
from tests.ops.weights import dense, nf4, random_weight

SHAPES = [(1, 1), (5, 33), (33, 63), (9, 123), (64, 256), (3, 8200)]
BLOCK_SIZES = [32, 64, 128, 4096]
KINDS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.fixture(params=ISAS)
def kernels(request):
    with using_threads(1), running_on(request.param), ops.use_backend("cpu_int16"):
        yield


def bound(x, weight, K, block_size):
    """What half a step of 16-bit values of the codebook and of 14-bit values of x come to: [M, N].

    A step is the largest of the codebook / 32767, the largest of each 64 elements of x / 8191.
    """
    packed, absmax, absmax_scale, codebook = weight
    steps = codebook.abs().amax(1, keepdim=True).expand(-1, 16) / 32767
    w_step = dense(packed, absmax, absmax_scale, steps, K, block_size).double().abs()
    w = dense(*weight, K, block_size).double().abs()
    largest = torch.nn.functional.pad(x.double().abs(), (0, -K % 64)).unflatten(1, (-1, 64)).amax(2)
    x_step = largest.repeat_interleave(64, 1)[:, :K] / 8191
    x = x.double().abs()
    both = x_step @ (w + w_step / 2).T / 2 + x @ w_step.T / 2
    return both * (1 + 1e-4) + 1e-6 * (x @ w.T) + 1e-30


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_the_error_is_that_of_the_rounding(kernels, N, K, block_size):
    for double_quant, table_per_row in KINDS:
        weight = random_weight(N, K, block_size, double_quant, N if table_per_row else 1)
        w = dense(*weight, K, block_size).double()
        for M in (1, 2, 3, 4, 5, 8):
            x = torch.randn(M, K) * 10 ** torch.randn(M, K)
            y = ops.codebook_linear(x, *weight, None, block_size)
            error = (y.double() - x.double() @ w.T).abs()
            assert (error <= bound(x, weight, K, block_size)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_of_a_real_layer_is_within_2e_4(kernels, dtype):
    N, K = 600, 2048
    for double_quant in (False, True):
        weight = nf4(torch.randn(N, K) * 0.02, block_size=64, double_quant=double_quant)
        x, bias = torch.randn(2, 2, K).to(dtype), torch.randn(N).to(dtype)
        exact = x.double() @ dense(*weight, K, 64).double().T + bias.double()
        y = ops.codebook_linear(x, *weight, bias, 64)
        assert y.shape == (2, 2, N) and y.dtype == dtype
        rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        assert (y.double() - exact).norm() < (2e-4 + rounding) * exact.norm()


def test_sums_do_not_overflow(kernels):
    """Every product is the largest there is: the integers come to 2^31 less 327,672."""
    N, K = 3, 8192
    packed = torch.zeros(N, K // 2, dtype=torch.uint8)
    for w in (1.0, -1.0):
        codebook = torch.full((1, 16), w)
        for block_size in (32, 64, 256):
            absmax = torch.ones(N, K // block_size)
            y = ops.codebook_linear(torch.full((1, K), -2.0), packed, absmax, None, codebook,
                                    None, block_size)  # fmt: skip
            torch.testing.assert_close(y, torch.full((1, N), -2 * w * K), rtol=1e-6, atol=0)


def test_zeros_give_the_bias_and_what_is_not_finite_nan_in_its_row(kernels):
    weight, bias = random_weight(7, 100), torch.randn(7)
    x = torch.zeros(6, 100)
    x[1] = torch.randn(100)
    x[2, 70], x[3, 70], x[4, 99] = torch.nan, torch.inf, -torch.inf
    x[5] = 1e-37
    y = ops.codebook_linear(x, *weight, bias)
    assert torch.equal(y[0], bias) and torch.equal(y[5], bias)
    assert torch.equal(y[1], ops.codebook_linear(x[1], *weight, bias))
    assert y[2:5].isnan().all()
    for codebook in (torch.zeros(1, 16), torch.full((1, 16), torch.nan)):
        y = ops.codebook_linear(x[1], *weight[:3], codebook, bias)
        assert torch.equal(y, bias) if codebook[0, 0] == 0 else y.isnan().all()


def test_the_bits_do_not_depend_on_threads_or_other_rows(kernels):
    weight = random_weight(300, 1024, double_quant=True)
    x = torch.randn(7, 1024)
    alone = torch.stack([ops.codebook_linear(row, *weight) for row in x])
    for count in (1, 2):
        with using_threads(count):
            assert torch.equal(ops.codebook_linear(x, *weight), alone)


@needs_library
def test_it_is_for_few_rows_and_by_name_alone():
    weight = random_weight(20, 320)
    few, many = torch.randn(2, 320), torch.randn(40, 320)
    assert "cpu_int16" not in ops.explain("codebook_linear", few, *weight, None, 64)
    exact = [ops.codebook_linear(x, *weight) for x in (few, many)]
    dx = ops.codebook_linear_dx(many[:, :20], *weight, 320)
    with ops.use_backend("cpu_int16"):
        assert "cpu_int16: runs" in ops.explain("codebook_linear", few, *weight, None, 64)
        assert not torch.equal(ops.codebook_linear(few, *weight), exact[0])
        assert torch.equal(ops.codebook_linear(many, *weight), exact[1])
        assert torch.equal(ops.codebook_linear_dx(many[:, :20], *weight, 320), dx)


@needs_library
def test_a_layer_runs_on_it():
    layer = lowrank.QuantLinear.from_linear(torch.nn.Linear(512, 384), "nf4")
    x = torch.randn(1, 3, 512)
    with torch.no_grad():
        exact = layer(x)
        with ops.use_backend("cpu_int16"):
            y = layer(x)
    assert 0 < (y - exact).norm() < 2e-4 * exact.norm()
