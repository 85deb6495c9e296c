"""The tables of values: where they come from, and the codes and errors that bitsandbytes has."""

from statistics import NormalDist

import pytest
import torch
from torch.special import ndtr, ndtri

from lowrank import quant
from lowrank.ops import BLOCK_SIZES
from lowrank.quant.af4 import abnormal_float
from lowrank.quant.normal_float import normal_float

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
F = bnb.functional

# Mean |error| on N(0, 1), from bitsandbytes' own tests (tests/test_functional.py, 1000 samples).
DOCUMENTED = {
    "nf4": dict(zip(BLOCK_SIZES[1:], (0.072792, 0.076835, 0.080326, 0.083535, 0.086603, 0.089592,
                                      0.092537), strict=True)),
    "fp4": dict(zip(BLOCK_SIZES[1:], (0.096545, 0.102947, 0.108685, 0.114087, 0.119312, 0.124460,
                                      0.129573), strict=True)),
}  # fmt: skip


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_weights_and_error_are_bitsandbytes(name, block_size):
    weight = torch.randn(128, 8192)
    packed, state = F.quantize_4bit(
        weight, blocksize=block_size, quant_type=name, compress_statistics=False
    )
    quantizer = quant.get(name, block_size=block_size, double_quant=False)
    storage = quantizer.quantize(weight)
    assert torch.equal(storage["packed"].flatten(), packed.flatten())
    assert torch.equal(storage["absmax"].flatten(), state.absmax)
    got = quantizer.dequantize(storage)
    assert torch.equal(got, F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("size", [1.0, 0.37, 3e30, 1e-30, 1e-37, 1e-39, 1e-44])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_at_ties_near_zero_and_among_subnormals_are_bitsandbytes(name, size):
    """A weight half-way between two values, and its neighbours; zeros of both signs."""
    values = quant.get(name).codebook[0].unique()
    middles = (values[1:] + values[:-1]) / 2
    for block_size in BLOCK_SIZES:
        weight = middles[torch.randint(0, len(middles), (40, block_size))]
        weight *= 1 + torch.randint(-3, 4, weight.shape) * 2.0**-23
        tiny = torch.randn_like(weight) * 10.0 ** -torch.randint(1, 40, weight.shape)
        weight = torch.where(torch.rand_like(weight) < 0.2, tiny, weight).clamp(-1, 1)
        weight[:, 0] = torch.randint(0, 2, (40,)) * 2 - 1
        weight *= size
        weight[:, 1], weight[:, 2], weight[0], weight[1] = 0.0, -0.0, 0.0, -0.0
        packed, state = F.quantize_4bit(
            weight, blocksize=block_size, quant_type=name, compress_statistics=False
        )
        quantizer = quant.get(name, block_size=block_size, double_quant=False)
        storage = quantizer.quantize(weight)
        assert torch.equal(storage["packed"].flatten(), packed.flatten())
        assert torch.equal(quantizer.dequantize(storage), F.dequantize_4bit(packed, state))


def normal_blocks(block_size, shift):
    """2 million weights of N(0, 1) in rows of one block, spread evenly rather than drawn.

    Largest magnitudes M by equal steps of P(max < M) = (2 Φ(M) - 1)^G, the others by equal steps of
    their distribution below M. Draws differ by `shift`, how far into its step each M lies, and by
    little else: the mean error of two, of shift and 1 - shift, is right to 2e-5.
    """
    rows = (1 << 21) // block_size
    steps = torch.arange(rows, dtype=torch.float64)[:, None]
    largest = ndtri((1 + ((steps + shift) / rows) ** (1 / block_size)) / 2)
    places = torch.arange(block_size - 1) + (steps * 0.6180339887498949 + torch.rand(())) % 1
    below = ndtr(largest)
    others = ndtri(1 - below + places / (block_size - 1) * (2 * below - 1))
    signs = torch.randint(0, 2, (rows, 1)) * 2 - 1
    return torch.cat((largest * signs, others), dim=1).float()


@pytest.mark.parametrize("block_size", BLOCK_SIZES[1:])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_errors_on_normal_weights_are_the_documented_ones_to_four_digits(name, block_size):
    quantizer = quant.get(name, block_size=block_size, double_quant=False)
    errors, u = [], torch.rand(())
    for shift in (u, 1 - u):
        weight = normal_blocks(block_size, shift)
        assert weight.std().item() == pytest.approx(1, abs=1e-3)
        error = quantizer.dequantize(quantizer.quantize(weight)) - weight
        errors.append(error.abs().mean().item())
    assert abs(sum(errors) / 2 - DOCUMENTED[name][block_size]) < 5e-5


def test_fp4_is_in_the_order_of_bitsandbytes():
    assert torch.equal(quant.get("fp4").codebook[0], F.get_4bit_type("fp4", device="cpu"))


def test_int4_has_the_levels_of_bitsandbytes():
    """Its "int4" divides -7 to 7 by 7, -0 among them."""
    levels = torch.arange(-7, 8) / 7
    assert torch.equal(quant.get("int4").codebook[0].unique(), levels)
    weight = torch.randn(16, 256)
    quantizer = quant.get("int4", double_quant=False)
    storage = quantizer.quantize(weight)
    absmax = weight.unflatten(1, (-1, 64)).abs().amax(-1, keepdim=True)
    expected = (weight.unflatten(1, (-1, 64)) / (absmax / 7)).round() * absmax / 7
    torch.testing.assert_close(quantizer.dequantize(storage), expected.flatten(1))
    nibbles = torch.stack((storage["packed"] >> 4, storage["packed"] & 15))
    assert nibbles.max() == 14  # the double of the last is never a code


def test_normal_floats_are_quantiles():
    nf4 = quant.get("nf4").codebook[0]
    torch.testing.assert_close(torch.tensor(normal_float(4)), nf4, rtol=0, atol=3e-7)
    for bits in (2, 3, 4):
        half = 2 ** (bits - 1)
        top, quantile = 0.9677083333333333, NormalDist().inv_cdf
        sides = [
            [quantile(0.5 + (top - 0.5) * i / count) / quantile(top) for i in range(1, count + 1)]
            for count in (half - 1, half)
        ]
        expected = [-v for v in reversed(sides[0])] + [0.0] + sides[1]
        assert len(expected) == 2**bits
        assert normal_float(bits) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("name", "bits"), [("nf3", 3), ("nf2", 2)])
def test_narrow_codes_are_the_nearest_values_and_take_their_bits(name, bits):
    weight = torch.randn(300, 4096)
    quantizer = quant.get(name, double_quant=False)
    storage = quantizer.quantize(weight)
    absmax = weight.unflatten(1, (-1, 64)).abs().amax(-1, keepdim=True)
    scaled = (weight.unflatten(1, (-1, 64)) / absmax)[..., None]
    values = torch.tensor(normal_float(bits))
    distance = (scaled - values).abs()
    got = (quantizer.dequantize(storage).unflatten(1, (-1, 64)) / absmax)[..., None]
    assert ((scaled - got).abs()[..., 0] <= distance.amin(-1) + 1e-6).all()
    assert storage["planes"].shape == (300, bits, 512)
    assert storage.bits_per_parameter == pytest.approx(bits + 0.5, abs=1e-3)
    nested = quant.get(name).quantize(weight)
    assert nested.bits_per_parameter == pytest.approx(bits + 0.125 + 64 / 4096, abs=1e-3)


def test_af4_is_as_published_at_64():
    published = F.get_4bit_type("af4", device="cpu").sort().values
    got = torch.tensor(abnormal_float(64))
    torch.testing.assert_close(got, published, rtol=0, atol=1e-5)
    assert torch.equal(quant.get("af4").codebook[0], got)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_af4_values_are_medians_of_what_is_nearest(block_size):
    table = torch.tensor(quant.get("af4", block_size=block_size).codebook[0].tolist())
    assert table[7] == 0 and table[0] == -1 and table[15] == 1
    blocks = torch.randn((1 << 21) // block_size, block_size)
    scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()
    scaled = scaled[scaled.abs() < 1]
    for side, values in (
        (scaled[scaled > 0], table[8:]),
        (-scaled[scaled < 0], -table[:7].flip(0)),
    ):
        edges = torch.cat((torch.zeros(1), (values[1:] + values[:-1]) / 2))
        for low, high, value in zip(edges[:-1], edges[1:], values[:-1], strict=True):
            median = side[(side > low) & (side < high)].median()
            assert abs(median - value) < 0.02 * (high - low) + 1e-3
