"""Double quantization: which scales are exact, and how far the others may be off."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank import quant
from lowrank.quant import double_quant

LEAST, GREATEST = 2.0**-118, 2.0**127  # of the magnitudes whose extremes are promised
scales = st.just(0.0) | st.floats(min_value=LEAST, max_value=GREATEST, width=32)


@st.composite
def rows(draw, elements=scales):
    blocks = draw(st.integers(1, 9))
    row = st.lists(elements, min_size=blocks, max_size=blocks)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=4)), dtype=torch.float32)


def round_trip(absmax):
    codes, constants = double_quant.compress(absmax)
    assert codes.dtype == torch.uint8 and codes.shape == absmax.shape
    assert constants.dtype == torch.float32 and constants.shape == (absmax.shape[0], 2)
    return double_quant.expand(codes, constants)


def extremes(values):
    return torch.stack(values.aminmax(dim=1), dim=1)


@given(rows(), st.sampled_from([1, -1]))
@settings(deadline=None, max_examples=500)
def test_zeros_and_both_extremes_of_a_row_are_exact(absmax, sign):
    absmax = absmax * sign
    got = round_trip(absmax)
    assert (got[absmax == 0] == 0).all()
    assert torch.equal(extremes(got), extremes(absmax))
    for extreme in (absmax.amin(1, keepdim=True), absmax.amax(1, keepdim=True)):
        assert torch.equal(got[absmax == extreme], absmax[absmax == extreme])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("exponent", [-117, -30, 0, 126])
@pytest.mark.parametrize("narrow", [0, 1, 12, 22])
def test_extremes_that_no_sum_from_the_least_can_reach(narrow, exponent, sign):
    """The least ends in half of the greatest's last bit, which is odd: all sums round past it."""
    odd = torch.randint(1 << 22, 1 << 23, (4000, 1)).double() * 2 + 1
    least = torch.randint(0, 1 << (22 - narrow), (4000, 1)).double() + 0.5
    between = least + (odd - least) * torch.rand(4000, 6).double()
    absmax = (torch.cat((least, between, odd), dim=1) * 2.0 ** (exponent - 23)).float() * sign
    unreachable = (absmax[:, -1] - absmax[:, 0]) + absmax[:, 0] != absmax[:, -1]
    assert unreachable.float().mean() > 0.2
    got = round_trip(absmax)
    assert torch.equal(extremes(got), extremes(absmax))
    assert torch.equal(got[:, 0], absmax[:, 0]) and torch.equal(got[:, -1], absmax[:, -1])
    spread = (absmax[:, -1:] - absmax[:, :1]).abs()
    assert ((got - absmax).abs() <= spread / 254 + 3e-7 * absmax.abs()).all()


@given(rows(st.floats(min_value=0, max_value=2.0**-118, width=32)))
@settings(deadline=None, max_examples=300)
def test_below_them_the_greatest_is_off_by_128_of_the_least_floats_at_most(absmax):
    got = round_trip(absmax)
    assert (got[absmax == 0] == 0).all()
    assert torch.equal(got.amin(1), absmax.amin(1))
    assert ((got.amax(1) - absmax.amax(1)).abs() <= 128 * 2.0**-149).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nf4", "fp4", "af4", "int4"])
def test_the_weights_of_largest_and_least_scale_are_exact(name, dtype):
    weight = (torch.randn(300, 1000) / 30).to(dtype)
    quantizer = quant.get(name, block_size=32)
    got = quantizer.dequantize(quantizer.quantize(weight))
    largest = weight.abs().argmax(1, keepdim=True)
    assert torch.equal(got.gather(1, largest), weight.float().gather(1, largest))
    blocks = torch.nn.functional.pad(weight, (0, 24)).unflatten(1, (-1, 32))
    least = blocks.abs().amax(-1).argmin(1)  # the block of least scale, and in it the largest
    at = least * 32 + blocks[torch.arange(300), least].abs().argmax(1)
    assert torch.equal(got.gather(1, at[:, None]), weight.float().gather(1, at[:, None]))


@given(rows())
@settings(deadline=None, max_examples=300)
def test_no_scale_is_off_by_more_than_half_a_coarse_step(absmax):
    got = round_trip(absmax)
    spread = absmax.amax(1, keepdim=True) - absmax.amin(1, keepdim=True)
    # 128 steps in the worst case, float32 rounding beside
    assert ((got - absmax).abs() <= spread / 254 + 3e-7 * absmax.amax(1, keepdim=True)).all()


@given(rows())
@settings(deadline=None, max_examples=100)
def test_rows_do_not_see_each_other(absmax):
    codes, constants = double_quant.compress(absmax)
    for n in range(absmax.shape[0]):
        alone, own = double_quant.compress(absmax[n : n + 1])
        assert torch.equal(alone[0], codes[n]) and torch.equal(own[0], constants[n])


def test_nearly_all_steps_are_used_on_scales_of_real_size():
    absmax = torch.randn(500, 64, 64).abs().amax(-1) * 0.02
    codes, _ = double_quant.compress(absmax)
    assert codes.amax(1).float().mean() > 250
    assert (round_trip(absmax) - absmax).abs().mean() / absmax.mean() < 2e-3


@pytest.mark.parametrize(
    ("K", "low", "high"), [(4096, 4.135, 4.145), (14336, 4.125, 4.135), (576, 4.23, 4.24)]
)
def test_bits_a_weight(K, low, high):
    N = 1024
    bits = quant.get("nf4").quantize(torch.empty(N, K, device="meta")).bits_per_parameter
    assert low < bits < high
    # codes, 8 bits a block, step and offset of a row, the codebook
    assert bits == pytest.approx(4 + 8 / 64 + 64 / K + 512 / (N * K))


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize(("N", "K"), [(256, 4096), (768, 576), (2000, 128)])
def test_error_is_no_worse_than_that_of_flat_groups_of_256(N, K, spread):
    """bitsandbytes is the oracle: QLoRA's form, over normal weights and rows of unequal scale."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    weight = torch.randn(N, K) * torch.randn(N, 1).mul(spread).exp() / 50
    quantizer = quant.get("nf4")
    ours = quantizer.quantize(weight)
    packed, state = bnb.functional.quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=True
    )
    theirs = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    absmax = weight.unflatten(1, (-1, 64)).abs().amax(-1)
    got = double_quant.expand(ours["absmax"], ours["absmax_scale"])
    of_scales = [(x.reshape(N, -1) - absmax).norm() for x in (got, theirs)]
    assert of_scales[0] <= of_scales[1]
    dense = bnb.functional.dequantize_4bit(packed, state)
    errors = [(w - weight).norm() for w in (quantizer.dequantize(ours), dense)]
    assert errors[0] <= 1.0001 * errors[1]
