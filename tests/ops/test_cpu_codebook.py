"""The CPU kernels of every instruction set against the definition in float64 and the reference."""

import itertools

import pytest
import torch

from lowrank import ops
from lowrank.ops import reference
from lowrank.ops.cpu.codebook import linear_from_packed
from tests.ops.isas import ISAS, running_on, using_threads
from tests.ops.weights import dense, nf4, random_weight

pytestmark = pytest.mark.parametrize("isa", ISAS)

SHAPES = [(1, 1), (5, 33), (33, 63), (9, 123), (64, 256), (130, 1056), (3, 8200)]
BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
ROWS_OF_X = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 40]  # each way through the tiles, then stripes
# What rounding alone does to a sum of float32 products, and then to the result in its dtype.
EPS = {torch.float32: 1e-6, torch.bfloat16: 2**-8 + 1e-6, torch.float16: 2**-11 + 1e-6}
KINDS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.fixture(autouse=True)
def kernels(isa):
    with using_threads(1), running_on(isa):
        yield


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request, kernels):
    torch.set_num_threads(request.param)


def make(N, K, block_size, double_quant, table_per_row):
    return random_weight(N, K, block_size, double_quant, N if table_per_row else 1)


def error(got, a, b, extra=0.0):
    """Largest error of got ≈ a b + extra, relative to the magnitudes that rounding acts on."""
    exact, magnitude = a.double() @ b.double() + extra, a.double().abs() @ b.double().abs()
    # Below its normal numbers a dtype rounds to multiples of its smallest one.
    smallest = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    excess = ((got.double() - exact).abs() - smallest / 2).clamp(min=0)
    return (excess / (magnitude + abs(extra)).clamp(min=1e-300)).max().item()


def error_of_either(got, a, b, extra=0.0):
    """The same, where bfloat16 may have been multiplied by b rounded to it."""
    candidates = [b, b.bfloat16()] if got.dtype == torch.bfloat16 else [b]
    return min(error(got, a, candidate, extra) for candidate in candidates)


def check_quantize(N, K, block_size, dtype, tables):
    weight, codebook = torch.randn(N, K).to(dtype), torch.rand(tables, 16) * 2 - 1
    packed, absmax = ops.codebook_quantize(weight, codebook, block_size)
    expected_packed, expected_absmax = reference.codebook_quantize(weight, codebook, block_size)
    assert torch.equal(absmax, expected_absmax)
    assert torch.equal(packed, expected_packed)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_quantize_equals_the_reference(N, K, dtype):
    for block_size, tables in itertools.product(BLOCK_SIZES, (1, N)):
        check_quantize(N, K, block_size, dtype, tables)


def test_quantize_with_threads(threads):
    check_quantize(130, 1056, 64, torch.float32, 130)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_quantize_equals_bitsandbytes(kind, block_size):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    codebook = bnb.functional.get_4bit_type(kind, device="cpu")[None].clone()
    # Whole blocks in rows; one row with a partial block, which bitsandbytes divides by its absmax.
    for shape in ((32, 8192), (1, 12_346)):
        weight = torch.randn(shape) * 10 ** torch.empty(shape[0], 1).uniform_(-6, 3)
        packed, state = bnb.functional.quantize_4bit(
            weight, blocksize=block_size, quant_type=kind, compress_statistics=False
        )
        ours, absmax = ops.codebook_quantize(weight, codebook, block_size)
        assert torch.equal(absmax.flatten(), state.absmax)
        assert torch.equal(ours.flatten()[: packed.numel()], packed.flatten())


def test_quantize_takes_the_lower_neighbour_on_a_tie():
    codebook = torch.rand(1, 16).sort()[0] * 2 - 1
    codebook[0, 0], codebook[0, 15] = -1, 1
    mids = (codebook[0, :-1] + codebook[0, 1:]) / 2
    weight = torch.zeros(1, 32)
    weight[0, :15], weight[0, 15] = mids, 1.0
    packed, _ = ops.codebook_quantize(weight, codebook, 32)
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()
    assert codes[:16].tolist() == list(range(16))


def test_quantize_of_zeros_extremes_and_what_is_not_finite():
    codebook = torch.linspace(-1, 1, 16)[None]
    weight = torch.randn(6, 80)
    weight[0] = 0
    weight[1, 70], weight[2, 3], weight[3, 79] = torch.nan, torch.inf, -torch.inf
    weight[4, :64] = 1e-40
    packed, absmax = ops.codebook_quantize(weight, codebook, 64)
    assert (absmax[0] == 0).all()
    assert absmax.isfinite().tolist() == [
        [True, True],
        [True, False],
        [False, True],
        [True, False],
        [True, True],
        [True, True],
    ]
    finite = absmax.isfinite().all(1)
    expected, _ = reference.codebook_quantize(weight[finite], codebook, 64)
    assert torch.equal(packed[finite], expected)


def test_quantize_of_rows_apart():
    whole, codebook = torch.randn(20, 200), torch.rand(1, 16)
    view = whole[::3, 50:173]
    for got, expected in zip(
        ops.codebook_quantize(view, codebook, 64),
        ops.codebook_quantize(view.contiguous(), codebook, 64),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("double_quant", "table_per_row"), KINDS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_dequantize_is_the_definition_bit_for_bit(N, K, double_quant, table_per_row):
    for block_size in BLOCK_SIZES:
        weight = make(N, K, block_size, double_quant, table_per_row)
        expected = dense(*weight, K, block_size)
        for dtype in EPS:
            got = ops.codebook_dequantize(*weight, K, block_size, dtype)
            assert torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize("dtype", EPS)
def test_dequantize_rounds_large_small_and_subnormal_weights_as_torch(dtype, threads):
    packed, absmax, _, codebook = random_weight(64, 2048, 32)
    absmax = 10 ** torch.empty_like(absmax).uniform_(-45, 38)
    got = ops.codebook_dequantize(packed, absmax, None, codebook, 2048, 32, dtype)
    assert torch.equal(got, dense(packed, absmax, None, codebook, 2048, 32).to(dtype))


@pytest.mark.parametrize("K", [2080, 2064, 2050])
def test_dequantize_past_the_caches(K, threads):
    """16 MB and more, with rows that begin at multiples of 64 bytes and rows that do not."""
    weight = random_weight(4200, K, 64, double_quant=True)
    expected = dense(*weight, K, 64)
    for dtype in EPS:
        got = ops.codebook_dequantize(*weight, K, 64, dtype)
        assert torch.equal(got, expected.to(dtype))


@pytest.mark.parametrize(("double_quant", "table_per_row"), KINDS)
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_linear_and_dx(N, K, dtype, double_quant, table_per_row):
    block_size = 2 ** torch.randint(5, 13, ()).item()
    weight = make(N, K, block_size, double_quant, table_per_row)
    W = dense(*weight, K, block_size)
    for M in ROWS_OF_X:
        x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        bias = torch.randn(N).to(dtype) if M % 2 else None
        y = ops.codebook_linear(x, *weight, bias, block_size)
        assert y.dtype == dtype and y.shape == (M, N)
        extra = 0.0 if bias is None else bias.double()
        assert error_of_either(y, x, W.T, extra) < EPS[dtype], M
        dx = ops.codebook_linear_dx(dy, *weight, K, block_size)
        assert dx.dtype == dtype and dx.shape == (M, K)
        assert error_of_either(dx, dy, W) < EPS[dtype], M


@pytest.mark.parametrize("N", [500, 1400])
@pytest.mark.parametrize("M", [1, 2, 16, 33, 130, 384, 385, 520])
def test_linear_and_dx_of_one_panel_and_of_several(M, N, threads):
    K = 2080  # half a panel of 2^21 weights, and 1.4 of them
    weight = random_weight(N, K, 64, double_quant=True)
    W = dense(*weight, K, 64)
    x, dy = torch.randn(M, K), torch.randn(M, N)
    assert error(ops.codebook_linear(x, *weight), x, W.T) < 1e-6
    assert error(ops.codebook_linear_dx(dy, *weight, K), dy, W) < 1e-6


@pytest.mark.parametrize("biased", [False, True])
def test_a_thousand_rows_of_x(biased):
    M, N, K = 1025, 2080, 2048  # more than one of the larger panels
    weight, x = random_weight(N, K, 64, double_quant=True), torch.randn(M, K)
    bias = torch.randn(N) if biased else None
    y = ops.codebook_linear(x, *weight, bias)
    extra = bias.double() if biased else 0.0
    assert error(y[::8], x[::8], dense(*weight, K, 64).T, extra) < 1e-6


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("M", [17, 33, 513, 530])
@pytest.mark.parametrize(
    ("N", "K", "table_per_row"), [(1, 63, False), (13, 300, True), (699, 545, False)]
)
def test_many_rows_from_packed_codes(N, K, M, table_per_row, dtype, threads):
    """Whatever instruction sets dispatch gives so many rows: ends of stripes, blocks, passes."""
    weight = make(N, K, 128, True, table_per_row)
    W = dense(*weight, K, 128)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    y = linear_from_packed("lowrank_codebook_linear", x, weight, bias, 128)
    assert error(y, x, W.T, bias.double()) < EPS[dtype]


@pytest.mark.parametrize("M", [1, 5, 17, 64])
def test_bfloat16_is_as_near_as_that_of_dense_weights(M, threads):
    """To the weight that was quantized in float32, whatever the product rounds on its way."""
    N, K = 2100, 1056  # panels of 1024 rows or columns, and narrower ones
    weight = nf4(torch.randn(N, K) * 0.02, block_size=64, double_quant=True)
    W = dense(*weight, K, 64)
    x, dy = torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
    bias = torch.randn(N).bfloat16()
    for got, plain, exact in (
        (
            ops.codebook_linear(x, *weight, bias),
            torch.nn.functional.linear(x, W.bfloat16(), bias),
            x.double() @ W.double().T + bias.double(),
        ),
        (ops.codebook_linear_dx(dy, *weight, K), dy @ W.bfloat16(), dy.double() @ W.double()),
    ):
        assert (got.double() - exact).norm() <= 1.05 * (plain.double() - exact).norm()


@pytest.mark.parametrize("M", [1, 3, 20])
def test_the_pad_of_a_row_is_never_read_as_weights(M):
    packed, absmax, scale, codebook = random_weight(10, 70, 32)
    cleared = packed.clone()
    cleared[:, 35:] = 0
    x = torch.randn(M, 70)
    got = ops.codebook_linear(x, packed, absmax, scale, codebook, None, 32)
    assert torch.equal(got, ops.codebook_linear(x, cleared, absmax, scale, codebook, None, 32))


def test_gradients_through_autograd():
    weight = random_weight(31, 95, 32, double_quant=True)
    W = dense(*weight, 95, 32)
    for M in (2, 30):
        x = torch.randn(M, 95, requires_grad=True)
        bias = torch.randn(31, requires_grad=True)
        dy = torch.randn(M, 31)
        dx, dbias = torch.autograd.grad(
            ops.codebook_linear(x, *weight, bias, 32), (x, bias), dy, materialize_grads=True
        )
        assert error(dx, dy, W) < 1e-6
        torch.testing.assert_close(dbias, dy.sum(0))


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 64), (3, 0, 64), (2, 9, 64)])
def test_leading_dimensions_and_strides(shape):
    weight = random_weight(10, 64)
    W = dense(*weight, 64, 64)
    x = torch.randn(*shape[:-1], 128)[..., ::2]  # not contiguous
    y = ops.codebook_linear(x, *weight)
    assert y.shape == (*shape[:-1], 10)
    torch.testing.assert_close(y, x @ W.T, rtol=1e-5, atol=1e-5)
    dy = torch.randn(10, *shape[:-1]).movedim(0, -1)
    dx = ops.codebook_linear_dx(dy, *weight, 64)
    assert dx.shape == shape
    torch.testing.assert_close(dx, dy @ W, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("M", [1, 2, 5, 20])
def test_nan_in_x_stays_in_its_row(M):
    weight = random_weight(9, 123, 32)
    x = torch.randn(M, 123)
    x[0, 122] = torch.nan
    y = ops.codebook_linear(x, *weight, None, 32)
    assert y[0].isnan().all() and not y[1:].isnan().any()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_default_dtype_and_device_of_the_caller_change_nothing(default):
    weight, x = torch.randn(9, 123), torch.randn(20, 123)
    codebook = torch.rand(1, 16)

    def run():
        packed, absmax = ops.codebook_quantize(weight, codebook, 32)
        q = (packed, absmax, None, codebook)
        return (
            packed,
            absmax,
            ops.codebook_dequantize(*q, 123, 32),
            ops.codebook_linear(x[:3], *q, None, 32),
            ops.codebook_linear(x, *q, None, 32),
            ops.codebook_linear_dx(x[:, :9], *q, 123, 32),
            ops.linear_cross_entropy(x, weight, torch.zeros(20, dtype=torch.int64, device="cpu")),
        )

    expected = run()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            got = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
