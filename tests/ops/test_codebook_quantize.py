"""codebook_quantize: nearest codes, ties, short blocks, zeros."""

import pytest
import torch

from lowrank import ops
from lowrank.errors import ConfigError, DtypeError, ShapeError
from tests.ops.weights import dense

SHAPES = [(1, 1), (7, 33), (5, 63), (9, 123), (4, 64), (3, 4097)]


@pytest.fixture(autouse=True, params=["reference", None], ids=["reference", "best"])
def backend(request):
    with ops.use_backend(request.param):
        yield


def sorted_table(tables=1):
    table = torch.rand(tables, 16) * 2 - 1
    table[:, 0], table[:, 15] = -1, 1
    return table.sort(dim=1).values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_every_code_is_a_nearest_entry(N, K, block_size, dtype):
    weight, table = torch.randn(N, K).to(dtype), sorted_table()
    packed, absmax = ops.codebook_quantize(weight, table, block_size)
    got = dense(packed, absmax, None, table, K, block_size).double()

    blocks = -(-K // block_size)
    padded = torch.zeros(N, blocks * block_size)
    padded[:, :K] = weight
    assert torch.equal(absmax, padded.view(N, blocks, block_size).abs().amax(-1))
    scale = absmax.double().repeat_interleave(block_size, 1)[:, :K]
    error = (got - weight.double()).abs()
    best = (table.double()[0] * scale[..., None] - weight.double()[..., None]).abs().amin(-1)
    assert (error <= best + 1e-6 * scale).all()  # beyond the rounding of a midpoint


def test_a_tie_goes_to_the_lower_entry():
    table = torch.linspace(-1, 1, 16)[None].mul(15).round().div(16)  # dyadic: midpoints are exact
    table[0, 15] = 1.0
    mids = (table[0, 1:] + table[0, :-1]) / 2
    weight = torch.cat([mids, torch.tensor([1.0])])[None]
    packed, _ = ops.codebook_quantize(weight, table, 32)
    codes = torch.stack((packed >> 4, packed & 15), -1).flatten()
    assert codes[:16].tolist() == list(range(15)) + [15]


@pytest.mark.parametrize("K", [1, 33, 63, 123])
def test_pads_are_written_as_zero(K):
    packed, _ = ops.codebook_quantize(torch.randn(5, K), sorted_table(), 32)
    assert packed.shape == (5, (K + 31) // 32 * 16)
    codes = torch.stack((packed >> 4, packed & 15), -1).flatten(1)
    assert (codes[:, K:] == 0).all()


def test_a_zero_block_has_absmax_zero_and_decodes_to_zero():
    weight = torch.randn(6, 100)
    weight[2] = 0
    weight[4, 64:] = 0
    table = sorted_table()
    packed, absmax = ops.codebook_quantize(weight, table, 64)
    assert absmax[2].tolist() == [0, 0] and absmax[4, 1] == 0
    got = dense(packed, absmax, None, table, 100, 64)
    assert (got[2] == 0).all() and (got[4, 64:] == 0).all()


def test_an_unsorted_table_is_another_order_of_the_same_values():
    weight, table = torch.randn(8, 123), sorted_table()
    order = torch.randperm(16)
    packed, absmax = ops.codebook_quantize(weight, table, 32)
    shuffled, absmax2 = ops.codebook_quantize(weight, table[:, order].contiguous(), 32)
    assert torch.equal(
        dense(packed, absmax, None, table, 123, 32),
        dense(shuffled, absmax2, None, table[:, order], 123, 32),
    )


def test_a_table_for_each_row_is_that_row_quantized_alone():
    weight, tables = torch.randn(5, 70), sorted_table(5)
    packed, absmax = ops.codebook_quantize(weight, tables, 32)
    for n in range(5):
        row = slice(n, n + 1)
        alone, alone_absmax = ops.codebook_quantize(weight[row], tables[row], 32)
        assert torch.equal(packed[row], alone) and torch.equal(absmax[row], alone_absmax)


def test_non_contiguous_and_sliced_rows_are_the_same_weight():
    weight, table = torch.randn(123, 40).T, sorted_table()
    packed, absmax = ops.codebook_quantize(weight, table, 32)
    again, absmax2 = ops.codebook_quantize(weight.contiguous(), table, 32)
    part, absmax3 = ops.codebook_quantize(weight[11:29], table, 32)
    assert torch.equal(packed, again) and torch.equal(absmax, absmax2)
    assert torch.equal(packed[11:29], part) and torch.equal(absmax[11:29], absmax3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [3, 65])
def test_not_finite_shows_in_absmax(bad, k):
    weight = torch.randn(3, 70)
    weight[1, k] = bad
    _, absmax = ops.codebook_quantize(weight, sorted_table(), 64)
    assert torch.isfinite(absmax).tolist() == [[True] * 2, [k >= 64, k < 64], [True] * 2]


def test_bad_input_is_named():
    table, weight = sorted_table(), torch.randn(4, 64)
    with pytest.raises(ShapeError, match="weight: expected"):
        ops.codebook_quantize(weight[0], table)
    with pytest.raises(ShapeError, match="weight: expected"):
        ops.codebook_quantize(weight[:, :0], table)
    with pytest.raises(DtypeError, match="weight: expected.*int32"):
        ops.codebook_quantize(weight.int(), table)
    for size in (0, 16, 48, 8192, -64, 64.5):
        with pytest.raises(ConfigError, match="power of two from 32 to 4096"):
            ops.codebook_quantize(weight, table, size)
    with pytest.raises(ShapeError, match="codebook: expected"):
        ops.codebook_quantize(weight, table[0])
    with pytest.raises(ShapeError, match="codebook: expected"):
        ops.codebook_quantize(weight, sorted_table(3))
    with pytest.raises(DtypeError, match="codebook: expected torch.float32"):
        ops.codebook_quantize(weight, table.double())
    with pytest.raises(ConfigError, match="codebook: expected on cpu"):
        ops.codebook_quantize(weight, table.to("meta"))
