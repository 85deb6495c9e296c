"""Affine int4 and hqq: the codes of their definition, offsets in 8 bits, and what hqq is for."""

import pytest
import torch

from lowrank import quant
from lowrank.errors import ConfigError, WeightError


def by_definition(weight, block_size):
    """Affine quantization of each block by itself, in float64."""
    out = torch.empty_like(weight, dtype=torch.float64)
    for n, row in enumerate(weight.double()):
        for k in range(0, len(row), block_size):
            block = row[k : k + block_size]
            low, high = min(block.min(), 0), max(block.max(), 0)
            step = (high - low) / 15
            out[n, k : k + block_size] = ((block - low) / step).round() * step + low
    return out


@pytest.mark.parametrize(("N", "K", "block_size"), [(3, 200, 64), (5, 33, 32), (2, 10, 4096)])
def test_weights_are_those_of_the_definition(N, K, block_size):
    weight = torch.randn(N, K)
    weight[0] = weight[0].abs() + 1
    quantizer = quant.get("int4_affine", block_size=block_size, double_quant=False)
    storage = quantizer.quantize(weight)
    torch.testing.assert_close(
        quantizer.dequantize(storage, torch.float64),
        by_definition(weight, block_size),
        rtol=1e-5,
        atol=1e-6,
    )
    assert storage["packed"].shape == (N, -(-K // 32) * 16)


def test_weights_that_were_affine_come_back_as_they_are():
    """As of a GGUF file of Q4_1, whose blocks are 32."""
    codes, scale = torch.randint(0, 16, (8, 256)), torch.rand(8, 8) / 50
    codes[:, 0::32], codes[:, 1::32] = 0, 15
    low = -scale * torch.randint(1, 15, (8, 8))
    weight = codes * scale.repeat_interleave(32, 1) + low.repeat_interleave(32, 1)
    quantizer = quant.get("int4_affine", block_size=32, double_quant=False)
    torch.testing.assert_close(quantizer.dequantize(quantizer.quantize(weight)), weight)


@pytest.mark.parametrize("name", ["int4_affine", "hqq"])
def test_scales_and_offsets_in_8_bits(name):
    weight = torch.randn(64, 4096)
    plain, nested = (quant.get(name, double_quant=dq) for dq in (False, True))
    a, b = plain.quantize(weight), nested.quantize(weight)
    assert a.bits_per_parameter == 5 and b.bits_per_parameter == 4.25 + 128 / 4096
    assert b["scale"].dtype == b["low"].dtype == torch.uint8
    assert b["scale_scale"].shape == b["low_scale"].shape == (64, 2)
    errors = [
        ((q.dequantize(s) - weight).norm() / weight.norm()).item()
        for q, s in ((plain, a), (nested, b))
    ]
    assert errors[1] < 1.005 * errors[0]


@pytest.mark.parametrize("name", ["int4_affine", "hqq"])
def test_a_range_beyond_float32_is_refused(name):
    weight = torch.zeros(3, 64)
    weight[2, 0], weight[2, 1] = 3e38, -3e38
    with pytest.raises(WeightError, match="less than 3.4e38 apart; got others in row 2"):
        quant.get(name).quantize(weight)


def test_hqq_lowers_the_error_it_minimises_and_never_raises_it():
    # a heavy tail: most weights small, a few large
    weight = torch.randn(100, 512) * torch.rand(100, 512).pow(3)
    affine, hqq = (quant.get(name, double_quant=False) for name in ("int4_affine", "hqq"))
    errors = [
        (q.dequantize(q.quantize(weight)) - weight).abs().unflatten(1, (-1, 64)).mean(-1)
        for q in (affine, hqq)
    ]
    assert errors[1].mean() < 0.98 * errors[0].mean()
    assert (errors[1] <= 1.0001 * errors[0] + 1e-7).all()


def test_hqq_is_the_published_iteration():
    """By scalars in float64, a block at a time; both keep the offset of least mean error."""
    weight = torch.randn(4, 100)
    quantizer = quant.get("hqq", block_size=64, double_quant=False)
    storage = quantizer.quantize(weight)
    for n in range(4):
        for b, columns in enumerate((slice(0, 64), slice(64, 100))):
            w = weight[n, columns].double()
            low, high = w.min(), w.max()
            scale = (high - low) / 15
            w = w / scale
            z, beta, best = -low / scale, 10.0, (torch.inf, None)
            for _ in range(20):
                d = w - ((w + z).round().clamp(0, 15) - z)
                best = min(best, (d.abs().mean().item(), z.item()))
                e = d.sign() * (d.abs() - d.abs() ** -0.3 / beta).clamp(min=0)
                z = ((w + z).round().clamp(0, 15) - (w - e)).mean()
                beta *= 1.01
            got = storage["low"][n, b] / -storage["scale"][n, b]
            d = w - ((w + got).round().clamp(0, 15) - got)
            assert d.abs().mean() <= best[0] + 1e-3  # a code at a tie may send it elsewhere


def test_bad_options_are_named():
    for name in ("int4_affine", "hqq", "int8_blockwise", "nf3", "fitted", "af4"):
        with pytest.raises(ConfigError, match="block_size: expected a power of two from 32"):
            quant.get(name, block_size=48)
        with pytest.raises(ConfigError, match="double_quant: expected True or False; got 1"):
            quant.get(name, double_quant=1)
        with pytest.raises(ConfigError, match=f"quantizer '{name}': .*group_size"):
            quant.get(name, group_size=64)
    with pytest.raises(ConfigError, match="per: expected 'tensor' or 'row'; got 'column'"):
        quant.get("fitted", per="column")
