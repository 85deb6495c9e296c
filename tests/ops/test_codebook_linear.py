"""codebook_dequantize, codebook_linear and codebook_linear_dx against the definition in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank import ops
from lowrank.errors import ConfigError, DtypeError, ShapeError
from lowrank.ops import reference
from tests.ops.oracle import assert_near, linear
from tests.ops.weights import dense, random_weight

SHAPES = [(1, 1, 1), (3, 7, 33), (5, 63, 63), (17, 9, 123), (40, 129, 256), (2, 3, 1025)]
KINDS = [
    dict(double_quant=False, tables=1),
    dict(double_quant=True, tables=1),
    dict(double_quant=False, tables="N"),
    dict(double_quant=True, tables="N"),
]
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)]


@pytest.fixture(autouse=True)
def backend():
    with ops.use_backend("reference"):
        yield


def make(N, K, block_size, kind):
    tables = N if kind["tables"] == "N" else 1
    return random_weight(N, K, block_size, kind["double_quant"], tables)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [32, 64, 1024])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_dequantize_is_the_definition_bit_for_bit(M, N, K, block_size, kind):
    weight = make(N, K, block_size, kind)
    expected = dense(*weight, K, block_size)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = ops.codebook_dequantize(*weight, K, block_size, dtype)
        assert got.dtype == dtype and torch.equal(got, expected.to(dtype))


def test_dequantize_of_more_than_a_panel():
    weight = random_weight(700, 2050, 64)  # 1.4 panels of 2^20 weights
    assert torch.equal(ops.codebook_dequantize(*weight, 2050), dense(*weight, 2050, 64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_linear_forward_and_gradients(M, N, K, dtype, tolerance, kind):
    weight = make(N, K, 32, kind)
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    bias = torch.randn(N, dtype=dtype, requires_grad=True)
    dy = torch.randn(M, N, dtype=dtype)

    y = ops.codebook_linear(x, *weight, bias, 32)
    assert y.dtype == dtype and y.is_contiguous()
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    assert dx.dtype == dbias.dtype == dtype
    assert_near((y, dx, dbias), linear, (x, dense(*weight, K, 32), bias, dy), tolerance)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 3, 64), (2, 0, 64)])
def test_any_leading_dimensions(shape):
    weight = random_weight(10, 64)
    x = torch.randn(shape)
    y = ops.codebook_linear(x, *weight)
    assert y.shape == (*shape[:-1], 10)
    torch.testing.assert_close(y, x @ dense(*weight, 64, 64).T, rtol=1e-5, atol=1e-5)
    dx = ops.codebook_linear_dx(y, *weight, 64)
    assert dx.shape == shape


def test_non_contiguous_x_and_dy():
    weight = random_weight(12, 96, 32)
    x, dy = torch.randn(96, 5).T, torch.randn(12, 5).T
    torch.testing.assert_close(
        ops.codebook_linear(x, *weight, None, 32), x @ dense(*weight, 96, 32).T
    )
    torch.testing.assert_close(
        ops.codebook_linear_dx(dy, *weight, 96, 32), dy @ dense(*weight, 96, 32)
    )


def test_only_the_weight_is_saved_for_backward():
    weight = random_weight(8, 64, double_quant=True)
    x, kept = torch.randn(5, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.codebook_linear(x, *weight)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in weight}


class LargestResult(TorchDispatchMode):
    """Sees every torch call and remembers the largest tensor that one returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_the_reference_never_holds_the_whole_weight():
    N, K = 3000, 1500
    weight, x, dy = random_weight(N, K), torch.randn(2, K), torch.randn(2, N)
    with LargestResult() as seen:
        reference.codebook_linear(x, *weight, None, 64)
        reference.codebook_linear_dx(dy, *weight, K, 64)
    assert 0 < seen.numel < N * K / 2


def test_rows_of_a_slice_are_the_slice_of_the_rows():
    packed, absmax, scale, codebook = random_weight(20, 123, 32, double_quant=True)
    x = torch.randn(4, 123)
    whole = ops.codebook_linear(x, packed, absmax, scale, codebook, None, 32)
    part = ops.codebook_linear(x, packed[3:11], absmax[3:11], scale[3:11], codebook, None, 32)
    torch.testing.assert_close(whole[:, 3:11], part)


def test_bad_input_is_named():
    packed, absmax, scale, codebook = weight = random_weight(8, 100, 64, double_quant=True)
    x = torch.randn(2, 100)

    def refuses(error, match, *, x=x, weight=weight, bias=None, block_size=64):
        with pytest.raises(error, match=match):
            ops.codebook_linear(x, *weight, bias, block_size)

    refuses(ShapeError, "packed: expected", x=torch.randn(2, 64))
    refuses(ShapeError, "scalar", x=torch.tensor(1.0))
    refuses(ShapeError, "absmax: expected", block_size=32)
    refuses(ConfigError, "power of two", block_size=100)
    refuses(DtypeError, "x: expected", x=x.int())
    refuses(ShapeError, "packed", weight=(packed[0], absmax, scale, codebook))
    refuses(DtypeError, "packed", weight=(packed.int(), absmax, scale, codebook))
    refuses(ShapeError, "absmax_scale", weight=(packed, absmax, scale[:4], codebook))
    refuses(DtypeError, "absmax: expected float32", weight=(packed, absmax, None, codebook))
    refuses(
        DtypeError, "absmax: expected torch.uint8", weight=(packed, absmax.float(), scale, codebook)
    )
    refuses(DtypeError, "absmax_scale", weight=(packed, absmax, scale.double(), codebook))
    refuses(ShapeError, "codebook", weight=(packed, absmax, scale, codebook.repeat(2, 1)))
    refuses(DtypeError, "codebook", weight=(packed, absmax, scale, codebook.half()))
    refuses(
        ConfigError,
        "codebook.*requires_grad",
        weight=(packed, absmax, scale, codebook.clone().requires_grad_()),
    )
    refuses(ShapeError, "bias: expected", bias=torch.randn(7))
    refuses(DtypeError, "bias: expected the dtype of x", bias=torch.randn(8).half())
    refuses(ConfigError, "x: expected on cpu", x=x.to("meta"))
    with pytest.raises(ShapeError, match="dy: expected"):
        ops.codebook_linear_dx(torch.randn(2, 7), *weight, 100)
    with pytest.raises(DtypeError, match="dtype: expected"):
        ops.codebook_dequantize(*weight, 100, dtype=torch.int32)
