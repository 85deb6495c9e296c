"""Errors on weights that no quantizer has touched: the 36 linear layers of all-MiniLM-L6-v2."""

import pytest
from safetensors.torch import load_file

from lowrank import quant

from .schemes import label, variants

pytestmark = pytest.mark.slow

# Relative RMSE at block size 64 (int8_blockwise: 256), without quantized scales.
EXPECTED = {"nf4": 0.0939, "int4": 0.1147, "fp4": 0.1271, "af4": 0.0973, "int4_affine": 0.0938}
EXPECTED |= {"hqq": 0.0895, "fitted-tensor": 0.0905, "fitted-row": 0.0856, "nf3": 0.2057}
EXPECTED |= {
    "flat-nf4": 0.0939,
    "flat-fp4": 0.1271,
    "nf2": 0.5696,
    "int8": 0.0100,
    "int8_blockwise": 0.0113,
    "none": 0,
}


@pytest.fixture(scope="module")
def weights(minilm):
    tensors = load_file(minilm)
    found = [w for name, w in tensors.items() if w.dim() == 2 and ".layer." in name]
    assert len(found) == 36
    return found


def relative_rmse(quantizer, weights):
    pairs = [((quantizer.dequantize(quantizer.quantize(w)) - w).double(), w) for w in weights]
    squares = [(error.square().sum(), w.double().square().sum()) for error, w in pairs]
    return (sum(e for e, _ in squares) / sum(w for _, w in squares)).sqrt().item()


@pytest.mark.parametrize("variant", [v for v in variants() if v[0] != "codebook"], ids=label)
def test_error_of_each_scheme(variant, weights):
    name, options = variant
    error = relative_rmse(quant.get(name, **options), weights)
    key = "-".join([name, *(options[k] for k in ("per", "quant_type") if k in options)])
    assert error == pytest.approx(EXPECTED[key], abs=1e-4)


def test_the_order_of_the_qlora_paper(weights):
    errors = [
        relative_rmse(quant.get(name, double_quant=False), weights)
        for name in ("nf4", "int4", "fp4")
    ]
    assert [round(e, 3) for e in errors] == [0.094, 0.115, 0.127]


def test_scales_in_8_bits_cost_no_more_than_qloras(weights):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantizer = quant.get("nf4")
    ours = theirs = 0
    for w in weights:
        packed, state = bnb.functional.quantize_4bit(
            w, quant_type="nf4", blocksize=64, compress_statistics=True
        )
        theirs += (bnb.functional.dequantize_4bit(packed, state) - w).double().square().sum()
        ours += (quantizer.dequantize(quantizer.quantize(w)) - w).double().square().sum()
    assert ours <= theirs
