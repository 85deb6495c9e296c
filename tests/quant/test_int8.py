"""int8 and int8_blockwise against bitsandbytes and against the nearest value."""

import pytest
import torch

from lowrank import quant
from lowrank.errors import WeightError

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
F = bnb.functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (7, 33), (40, 256), (3, 5000)])
def test_int8_is_bitsandbytes_bit_for_bit(N, K, dtype):
    weight = torch.randn(N, K).to(dtype) / 30
    CB, SCB, _ = F.int8_vectorwise_quant(weight.to(torch.float16))
    storage = quant.get("int8").quantize(weight)
    assert torch.equal(storage["CB"], CB) and torch.equal(storage["SCB"], SCB)
    assert torch.equal(quant.get("int8").dequantize(storage), F.int8_vectorwise_dequant(CB, SCB))
    assert storage.options == {}


def test_int8_has_what_a_linear8bitlt_saves():
    layer = bnb.nn.Linear8bitLt(96, 20, has_fp16_weights=False)
    weight = layer.weight.data.clone()
    state = layer.to("cpu").state_dict()
    storage = quant.get("int8").quantize(weight)
    if state["weight"].dtype == torch.int8:
        assert torch.equal(state["weight"], storage["CB"])
        assert torch.equal(state["SCB"], storage["SCB"])
    CB, SCB, _ = F.int8_vectorwise_quant(weight.half())
    assert torch.equal(CB, storage["CB"]) and torch.equal(SCB, storage["SCB"])


def test_int8_takes_8_bits_and_a_scale_a_row():
    storage = quant.get("int8").quantize(torch.randn(64, 4096))
    assert storage.bits_per_parameter == 8 + 32 / 4096


def test_int8_refuses_what_float16_does_not_hold():
    weight = torch.zeros(3, 4)
    weight[1, 2] = 65519  # rounds to 65504
    assert quant.get("int8").quantize(weight)["SCB"].tolist() == [0, 65504, 0]
    weight[1, 2] = -65520
    with pytest.raises(WeightError, match="magnitudes below 65520, .* got others in row 1"):
        quant.get("int8").quantize(weight)


@pytest.mark.parametrize("block_size", [64, 256, 4096])
def test_blockwise_is_bitsandbytes_but_for_its_coarse_search(block_size):
    """Its table of 65,536 bins misses the nearest value now and then, and every value near 0."""
    weight = torch.randn(16, 8192)
    theirs, state = F.quantize_blockwise(weight, blocksize=block_size)
    quantizer = quant.get("int8_blockwise", block_size=block_size)
    storage = quantizer.quantize(weight)
    assert torch.equal(storage["codebook"][0], F.create_dynamic_map())
    assert torch.equal(storage["absmax"].flatten(), state.absmax)
    differ = storage["codes"].flatten() != theirs.flatten()
    assert differ.float().mean() < 0.01
    dense = F.dequantize_blockwise(theirs, state)
    ours = quantizer.dequantize(storage)
    assert torch.equal(ours.flatten()[~differ], dense.flatten()[~differ])
    assert (ours - weight).abs().sum() <= (dense - weight).abs().sum()


def test_blockwise_takes_the_nearest_of_256():
    weight = torch.randn(5, 300)
    weight[:, ::7] *= 1e-4
    weight[:, 0] = 0
    quantizer = quant.get("int8_blockwise", block_size=128)
    storage = quantizer.quantize(weight)
    for b, columns in enumerate((slice(0, 128), slice(128, 256), slice(256, 300))):
        absmax = weight[:, columns].abs().amax(1)
        assert torch.equal(storage["absmax"][:, b], absmax)
        scaled = (weight[:, columns] / absmax[:, None]).double()[..., None]
        distance = (scaled - storage["codebook"][0].double()).abs()
        taken = distance.gather(2, storage["codes"][:, columns].long()[..., None])[..., 0]
        assert (taken <= distance.amin(-1) + 1e-7 * scaled.abs()[..., 0]).all()
    assert (quantizer.dequantize(storage)[:, 0] == 0).all()
