"""Fitted codebooks: Lloyd's algorithm, its optimum, and that it is the same every time."""

import pytest
import torch

from lowrank import quant
from lowrank.quant.fitted import lloyd


def squared_error(quantizer, weight):
    return (quantizer.dequantize(quantizer.quantize(weight)) - weight).double().square()


def cubed(*shape):
    return torch.randn(shape).pow(3)


@pytest.mark.parametrize("weight_of", [torch.randn, torch.rand, cubed])
def test_it_never_has_more_error_than_the_values_it_starts_from(weight_of):
    weight = weight_of(48, 640)
    nf4 = squared_error(quant.get("nf4", double_quant=False), weight)
    tensor, row = (
        squared_error(quant.get("fitted", per=per, double_quant=False), weight)
        for per in ("tensor", "row")
    )
    assert tensor.sum() <= 1.0001 * nf4.sum()
    assert (row.sum(1) <= 1.0001 * nf4.sum(1)).all()
    assert tensor.sum() < 0.97 * nf4.sum() and row.sum() < 0.97 * nf4.sum()


def test_rows_of_different_kinds_want_tables_of_their_own():
    weight = torch.cat([torch.randn(16, 640), torch.rand(16, 640)])
    tensor, row = (
        squared_error(quant.get("fitted", per=per, double_quant=False), weight).sum(1)
        for per in ("tensor", "row")
    )
    assert row.sum() < 0.95 * tensor.sum()


def test_each_value_is_the_weighted_mean_of_what_is_nearest():
    weight = torch.randn(64, 1024)
    storage = quant.get("fitted", double_quant=False).quantize(weight)
    values = storage["codebook"][0]
    assert (values.diff() >= 0).all()
    absmax = storage["absmax"].repeat_interleave(64, 1).double()
    scaled = weight.double() / absmax
    codes = torch.bucketize(scaled.float(), (values[1:] + values[:-1]) / 2)
    for code in range(16):
        chosen = codes == code
        mean = (absmax[chosen] ** 2 * scaled[chosen]).sum() / (absmax[chosen] ** 2).sum()
        assert abs(mean - values[code]) < 2e-3  # it stops after 50 steps


def test_a_table_for_each_row_is_that_of_the_row_alone():
    weight = torch.randn(9, 300) * torch.rand(9, 1)
    quantizer = quant.get("fitted", per="row", block_size=32)
    storage = quantizer.quantize(weight)
    assert storage["codebook"].shape == (9, 16) and storage["codebook"].unique(dim=0).shape[0] == 9
    for n in range(9):
        alone = quant.get("fitted", per="tensor", block_size=32).quantize(weight[n : n + 1])
        assert torch.equal(alone["codebook"][0], storage["codebook"][n])


def test_sixteen_distinct_values_are_found():
    """Within reach: near enough to the start that no value loses all its weights."""
    values = torch.tensor(quant.get("nf4").codebook[0].tolist()) * 0.97 + 0.003
    values[0], values[-1] = -1, 1
    weight = values[torch.randint(0, 16, (64, 256))]
    weight[:, ::64] = 1
    quantizer = quant.get("fitted", double_quant=False)
    torch.testing.assert_close(
        quantizer.dequantize(quantizer.quantize(weight)), weight, rtol=1e-5, atol=1e-6
    )


def test_a_large_weight_is_fitted_on_evenly_spaced_rows():
    weight = torch.randn(600, 8192)
    storage = quant.get("fitted").quantize(weight)
    assert torch.equal(storage["codebook"], quant.get("fitted").quantize(weight[::3])["codebook"])


def test_sums_do_not_depend_on_their_order():
    values, weights = torch.rand(3, 5000) * 2 - 1, torch.rand(3, 5000)
    start = quant.get("nf4").codebook
    order = torch.randperm(5000)
    first = lloyd(values, weights.clone(), start)
    assert torch.equal(lloyd(values[:, order], weights[:, order], start), first)
