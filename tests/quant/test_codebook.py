"""CodebookQuantizer and nf4: what is stored, how well, and what is refused."""

import pytest
import torch

from lowrank import quant
from lowrank.errors import ConfigError, DtypeError, ShapeError, WeightError

SHAPES = [(1, 1), (7, 33), (5, 63), (9, 123), (16, 256)]


def test_the_registry_makes_nf4_by_name():
    assert "nf4" in quant.names()
    quantizer = quant.get("nf4", block_size=128, double_quant=False)
    assert isinstance(quantizer, quant.Quantizer) and isinstance(quantizer, quant.CodebookQuantizer)
    assert quantizer.name == "nf4" and quantizer.row_local
    assert quantizer.options == {"block_size": 128, "double_quant": False}
    assert quant.get("nf4").options == {"block_size": 64, "double_quant": True}
    with pytest.raises(ConfigError, match="quantizer: expected one of .*nf4.*; got 'nf5'"):
        quant.get("nf5")
    with pytest.raises(ConfigError, match="quantizer 'nf4': .*blocksize"):
        quant.get("nf4", blocksize=64)


def test_the_storage_is_as_documented():
    storage = quant.get("nf4", block_size=32).quantize(torch.randn(6, 70, dtype=torch.bfloat16))
    assert storage.scheme == "nf4" and storage.shape == (6, 70) and storage.dtype == torch.bfloat16
    assert storage.options == {"block_size": 32, "double_quant": True}
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in storage.tensors.items()}
    assert list(layout.items()) == [
        ("packed", (torch.uint8, (6, 48))),
        ("absmax", (torch.uint8, (6, 3))),
        ("absmax_scale", (torch.float32, (6, 2))),
        ("codebook", (torch.float32, (1, 16))),
    ]
    plain = quant.get("nf4", block_size=32, double_quant=False).quantize(torch.randn(6, 70))
    assert list(plain.tensors) == ["packed", "absmax", "codebook"]
    assert plain["absmax"].dtype == torch.float32


def test_bits_of_a_weight_of_real_size():
    storage = quant.get("nf4").quantize(torch.randn(512, 4096))
    assert 4.12 < storage.bits_per_parameter < 4.15
    assert (
        4.49
        < quant.get("nf4", double_quant=False).quantize(torch.randn(512, 4096)).bits_per_parameter
        < 4.51
    )


def test_error_on_normal_weights_is_nf4s():
    weight = torch.randn(1024, 1024)
    for double_quant in (False, True):
        quantizer = quant.get("nf4", double_quant=double_quant)
        error = quantizer.dequantize(quantizer.quantize(weight)) - weight
        assert abs(error.abs().mean().item() - 0.0728) < 0.0005
        assert abs((error.norm() / weight.norm()).item() - 0.092) < 0.001


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_quantizing_what_was_dequantized_changes_nothing_but_scales(N, K, dtype, double_quant):
    quantizer = quant.get("nf4", block_size=32, double_quant=double_quant)
    first = quantizer.dequantize(quantizer.quantize(torch.randn(N, K).to(dtype)))
    second = quantizer.dequantize(quantizer.quantize(first))
    assert torch.allclose(first, second, rtol=2e-6 if not double_quant else 8e-3, atol=1e-7)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("N", "K"), [(9, 123), (40, 64), (11, 33)])
def test_a_slice_of_rows_is_that_slice_of_the_whole(N, K, double_quant):
    weight = torch.randn(N, K)
    quantizer = quant.get("nf4", double_quant=double_quant)
    assert quantizer.row_local
    whole = quantizer.quantize(weight)
    for rows in (slice(0, 3), slice(2, 9), slice(N - 1, N)):
        part = quantizer.quantize(weight[rows])
        for name, tensor in part.tensors.items():
            assert torch.equal(tensor, whole[name] if name == "codebook" else whole[name][rows])


@pytest.mark.parametrize("double_quant", [False, True])
def test_zero_rows_and_blocks_stay_zero(double_quant):
    weight = torch.randn(6, 200)
    weight[1] = 0
    weight[4, 64:128] = 0
    quantizer = quant.get("nf4", double_quant=double_quant)
    got = quantizer.dequantize(quantizer.quantize(weight))
    assert (got[1] == 0).all() and (got[4, 64:128] == 0).all() and torch.isfinite(got).all()


def test_a_table_for_each_row():
    tables = torch.rand(10, 16) * 2 - 1
    quantizer = quant.CodebookQuantizer(tables, block_size=32)
    assert not quantizer.row_local and quantizer.name == "codebook"
    weight = torch.randn(10, 70)
    storage = quantizer.quantize(weight)
    for n in range(10):
        alone = quant.CodebookQuantizer(tables[n], block_size=32)
        expected = alone.dequantize(alone.quantize(weight[n : n + 1]))
        assert torch.equal(quantizer.dequantize(storage)[n : n + 1], expected)
    with pytest.raises(ShapeError, match=r"codebook: expected \[1, 16\] or \[N=4, 16\]"):
        quantizer.quantize(weight[:4])


def test_linear_is_the_dequantized_product_with_gradients():
    quantizer = quant.get("nf4")
    storage = quantizer.quantize(torch.randn(20, 123))
    W = quantizer.dequantize(storage)
    x, bias = torch.randn(3, 4, 123, requires_grad=True), torch.randn(20, requires_grad=True)
    dy = torch.randn(3, 4, 20)
    got = quantizer.linear(x, storage, bias)
    expected = torch.nn.functional.linear(x, W, bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(got, (x, bias), dy),
        torch.autograd.grad(expected, (x, bias), dy),
        rtol=1e-5,
        atol=1e-4,
    )


def test_storages_share_no_memory():
    quantizer = quant.get("nf4")
    first, second = (quantizer.quantize(torch.randn(4, 64)) for _ in range(2))
    first["codebook"].zero_()
    assert (
        second["codebook"].abs().sum() > 0
        and quantizer.quantize(torch.randn(4, 64))["codebook"].any()
    )


def test_meta_weights_give_the_layout_and_allocate_nothing():
    for double_quant in (False, True):
        quantizer = quant.get("nf4", double_quant=double_quant)
        real = quantizer.quantize(torch.randn(9, 123))
        meta = quantizer.quantize(torch.empty(9, 123, device="meta"))
        assert {k: (t.shape, t.dtype) for k, t in meta.tensors.items()} == {
            k: (t.shape, t.dtype) for k, t in real.tensors.items()
        }
        assert all(t.is_meta for t in meta.tensors.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_weights_are_refused(bad, dtype):
    weight = torch.randn(5, 123, dtype=dtype)
    weight[3, 100] = bad
    with pytest.raises(
        WeightError, match="weight: expected finite values; got NaN or inf in row 3"
    ):
        quant.get("nf4").quantize(weight)


def test_bad_options_are_named():
    with pytest.raises(
        DtypeError,
        match="weight: expected a floating-point dtype .*; got torch.int8",
    ):
        quant.get("nf4").quantize(torch.zeros(4, 64, dtype=torch.int8))
    with pytest.raises(ShapeError, match="weight: expected"):
        quant.get("nf4").quantize(torch.randn(4, 4, 64))
    for size in (16, 65, 8192, 0, 64.0):
        with pytest.raises(
            ConfigError, match="block_size: expected a power of two from 32 to 4096"
        ):
            quant.get("nf4", block_size=size)
    with pytest.raises(ShapeError, match="codebook: expected 16 values"):
        quant.CodebookQuantizer(torch.randn(15))
    with pytest.raises(ConfigError, match=r"codebook: expected values in \[-1, 1\]"):
        quant.CodebookQuantizer(torch.linspace(-2, 2, 16))
    with pytest.raises(ConfigError, match="codebook: expected values"):
        quant.CodebookQuantizer([float("nan")] * 16)
    with pytest.raises(ConfigError, match="double_quant: expected True or False; got 'no'"):
        quant.get("nf4", double_quant="no")


@pytest.mark.parametrize("double_quant", [False, True])
def test_x_of_another_width_is_refused_though_its_bytes_would_do(double_quant):
    """K = 95 and K = 96 have as many packed bytes and scales."""
    quantizer = quant.get("nf4", double_quant=double_quant)
    storage = quantizer.quantize(torch.randn(8, 96))
    for K in (95, 97, 65):
        with pytest.raises(ShapeError, match=rf"x: expected \[..., K=96\]; got \[3, {K}\]"):
            quantizer.linear(torch.randn(3, K), storage)
