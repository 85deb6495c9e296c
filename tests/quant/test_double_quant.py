"""Double quantization: which scales are exact, and how far the others may be off."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
