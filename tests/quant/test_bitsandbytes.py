"""bitsandbytes as the oracle: the same codes, the same weights, its files read bit for bit."""

import json

import pytest
import torch

from lowrank import QuantLinear, quant
from lowrank.errors import ConfigError, FileFormatError, ShapeError
from lowrank.quant import bitsandbytes as ours

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
F = bnb.functional

STATE = "weight.quant_state.bitsandbytes__"


def layer_tensors(weight, kind="nf4", nested=True, block_size=64, storage=torch.uint8):
    """The state dict that bitsandbytes writes for this weight, and the weight it computes with."""
    packed, state = F.quantize_4bit(
        weight,
        blocksize=block_size,
        quant_type=kind,
        compress_statistics=nested,
        quant_storage=storage,
    )
    tensors = {"weight": packed}
    tensors |= {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    return tensors, F.dequantize_4bit(packed, state)


def edited(tensors, **changes):
    key = next(k for k in tensors if k.startswith(STATE))
    state = json.loads(bytes(tensors[key].tolist())) | changes
    return tensors | {key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), [(1, 256), (33, 256), (7, 1024)])
def test_codes_and_weights_are_bitsandbytes(N, K, dtype, block_size):
    weight = torch.randn(N, K, dtype=dtype)
    weight[0, :64] = 0
    theirs, dense = layer_tensors(weight, nested=False, block_size=block_size)
    quantizer = quant.get("nf4", block_size=block_size, double_quant=False)
    storage = quantizer.quantize(weight)
    assert torch.equal(storage["packed"].flatten(), theirs["weight"].flatten())
    assert torch.equal(storage["absmax"].flatten(), theirs["weight.absmax"])
    assert torch.equal(storage["codebook"].flatten(), theirs["weight.quant_map"])
    assert torch.equal(quantizer.dequantize(storage, dtype), dense)


def test_a_short_block_is_rounded_as_bitsandbytes_rounds_its_last():
    for K in (33, 63, 123):  # one row: then its blocks are ours, the last one short
        weight = torch.randn(1, K)
        theirs, dense = layer_tensors(weight, nested=False)
        quantizer = quant.get("nf4", double_quant=False)
        storage = quantizer.quantize(weight)
        assert torch.equal(storage["absmax"].flatten(), theirs["weight.absmax"])
        assert torch.equal(quantizer.dequantize(storage), dense.view(1, K))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_gives_the_very_weights(dtype, nested, kind, storage):
    tensors, dense = layer_tensors(torch.randn(72, 320, dtype=dtype), kind, nested, storage=storage)
    read = ours.read(tensors)
    assert read.shape == (72, 320) and read.dtype == dtype
    assert read.options == {"block_size": 64, "double_quant": False}
    assert torch.equal(ours.quantizer(read).dequantize(read, dtype), dense)


@pytest.mark.parametrize("double_quant", [False, True])
def test_what_is_written_bitsandbytes_dequantizes_to_the_same(double_quant):
    quantizer = quant.get("nf4", double_quant=double_quant)
    storage = quantizer.quantize(torch.randn(40, 192, dtype=torch.float16))
    written = ours.write(storage)
    stats = {k.removeprefix("weight."): v for k, v in written.items() if k != "weight"}
    state = F.QuantState.from_dict(stats, device="cpu")
    dense = F.dequantize_4bit(written["weight"], state)
    assert dense.dtype == torch.float16
    assert torch.equal(dense, quantizer.dequantize(storage, torch.float16))
    again = ours.read(written)
    assert torch.equal(again["packed"], storage["packed"])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quantizer", ["nf4", quant.get("nf4", block_size=128, double_quant=False)])
def test_a_layer_loads_the_state_dict_of_a_linear4bit(nested, kind, quantizer):
    theirs = bnb.nn.Linear4bit(
        128, 48, quant_type=kind, compress_statistics=nested, compute_dtype=torch.float32
    ).to("cpu")
    x = torch.randn(5, 128)
    expected = theirs(x)
    layer = QuantLinear(128, 48, quantizer=quantizer)
    outcome = layer.load_state_dict(theirs.state_dict())
    assert not outcome.missing_keys and not outcome.unexpected_keys
    weight = F.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(layer.dequantize(torch.float32), weight)
    assert torch.equal(layer.bias, theirs.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    again = QuantLinear(128, 48, quantizer=layer.quantizer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dequantize(), weight)


def test_a_model_loads_them_under_prefixes_onto_a_meta_skeleton():
    theirs = torch.nn.Sequential(
        bnb.nn.Linear4bit(64, 64), torch.nn.ReLU(), bnb.nn.Linear4bit(32, 64, bias=False)
    ).to("cpu")
    with torch.device("meta"):
        model = torch.nn.Sequential(
            QuantLinear(64, 64), torch.nn.ReLU(), QuantLinear(32, 64, bias=False)
        )
    tensors = theirs.state_dict()
    with pytest.raises(FileFormatError, match=r"2\.weight: .*cross the rows of \[N=64, K=32\]"):
        model.load_state_dict(tensors, assign=True)
    model[2] = QuantLinear(64, 64, bias=False, device="meta")
    tensors = {k: v for k, v in tensors.items() if k.startswith("0.")} | {
        f"2.{k}": v for k, v in bnb.nn.Linear4bit(64, 64, bias=False).to("cpu").state_dict().items()
    }
    model.load_state_dict(tensors, assign=True)
    assert not any(p.is_meta for p in model.parameters())
    assert torch.isfinite(model(torch.randn(3, 64))).all()


def test_another_shape_is_refused_by_name():
    tensors, _ = layer_tensors(torch.randn(32, 64))
    model = torch.nn.ModuleDict({"proj": QuantLinear(32, 64, bias=False)})
    with pytest.raises(
        ShapeError, match=r"proj\.weight: expected a weight of \[64, 32\]; got \[32, 64\]"
    ):
        model.load_state_dict({f"proj.{k}": v for k, v in tensors.items()})


def test_damaged_layers_are_refused_whole():
    tensors, _ = layer_tensors(torch.randn(32, 128))
    key = STATE + "nf4"
    cases = {
        "no quant_state": {k: v for k, v in tensors.items() if k != key},
        "expected JSON of a quant state": tensors | {key: tensors[key][:-3]},
        "expected blocksize, dtype and a shape": edited(tensors, dtype="int7"),
        "expected a block size from 32 to 4096; got 96": edited(tensors, blocksize=96),
        "cross the rows": edited(tensors, blocksize=256),
        "weight: expected 4096 elements; got 2048": edited(tensors, shape=[64, 128]),
        r"weight\.absmax: expected 64 elements": tensors
        | {"weight.absmax": tensors["weight.absmax"][1:]},
        "nested_absmax: expected beside": {
            k: v for k, v in tensors.items() if "nested_absmax" not in k
        },
        "nested_absmax: expected 1 elements": tensors | {"weight.nested_absmax": torch.ones(2)},
        "absmax: expected uint8 codes": tensors | {"weight.absmax": torch.ones(64)},
        "quant_map: expected 16": tensors | {"weight.quant_map": torch.ones(15)},
        "nested_blocksize and nested_offset": edited(tensors, nested_offset="x"),
    }
    for match, damaged in cases.items():
        with pytest.raises(FileFormatError, match=match):
            ours.read(damaged, "a.b.")
    plain, _ = layer_tensors(torch.randn(32, 128), nested=False)
    with pytest.raises(FileFormatError, match=r"a\.b\.weight\.absmax: .*got uint8 alone"):
        ours.read(plain | {"weight.absmax": tensors["weight.absmax"]}, "a.b.")


def test_what_bitsandbytes_cannot_hold_is_not_written():
    with pytest.raises(ConfigError, match="K: expected a multiple of the block size 64"):
        ours.write(quant.get("nf4").quantize(torch.randn(4, 96)))
    other = quant.CodebookQuantizer(torch.linspace(-1, 1, 16))
    with pytest.raises(ConfigError, match="the table of nf4; got 'codebook'"):
        ours.write(other.quantize(torch.randn(4, 64)))
