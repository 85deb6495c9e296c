"""Double quantization: which scales are exact, and how far the others may be off."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank import quant
from lowrank.quant import double_quant

scales = st.floats(min_value=0, max_value=2.0**126, width=32, allow_subnormal=False)


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


@given(rows())
@settings(deadline=None, max_examples=300)
def test_zeros_and_the_smallest_of_a_row_are_exact(absmax):
    got = round_trip(absmax)
    assert (got[absmax == 0] == 0).all()
    smallest = absmax == absmax.amin(1, keepdim=True)
    assert torch.equal(got[smallest], absmax[smallest])


@given(rows())
@settings(deadline=None, max_examples=300)
def test_the_largest_is_exact_wherever_a_sum_can_reach_it(absmax):
    got = round_trip(absmax)
    low, high = absmax.amin(1), absmax.amax(1)
    largest = got.gather(1, absmax.argmax(1, keepdim=True))[:, 0]
    reachable = (high - low) + low == high
    assert torch.equal(largest[reachable], high[reachable])
    ulp = torch.nextafter(high, high.new_tensor(torch.inf)) - high
    assert ((largest - high).abs() <= ulp).all()


@given(rows(st.floats(min_value=0, max_value=448, width=16)))
@settings(deadline=None, max_examples=300)
def test_extremes_of_16_bit_weights_are_always_exact(absmax):
    got = round_trip(absmax)
    for extreme in (absmax.argmax(1, keepdim=True), absmax.argmin(1, keepdim=True)):
        assert torch.equal(got.gather(1, extreme), absmax.gather(1, extreme))


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


@given(rows(st.floats(min_value=-(2.0**126), max_value=0, width=32, allow_subnormal=False)))
@settings(deadline=None, max_examples=300)
def test_offsets_below_zero_keep_their_least_and_every_zero(absmax):
    """As the offsets of affine schemes are."""
    absmax = torch.nn.functional.pad(absmax, (0, 1))  # a block of zeros in each row
    got = round_trip(absmax)
    assert (got[absmax == 0] == 0).all()
    smallest = absmax == absmax.amin(1, keepdim=True)
    assert torch.equal(got[smallest], absmax[smallest])
    assert ((got - absmax).abs() <= 3e-7 * absmax.abs() + absmax.amin(1, keepdim=True) / -254).all()


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
