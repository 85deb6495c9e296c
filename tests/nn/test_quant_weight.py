"""What a state dict says of a quantized weight is believed, checked, and never half taken."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from lowrank import QuantLinear, quant
from lowrank.errors import DtypeError, FileFormatError, LowrankError, ShapeError
from tests.quant.schemes import TABLE, label, same, variants

KEY = "_extra_state"


def edited(state: dict, **changes) -> dict:
    """The state dict with another description."""
    text = json.loads(bytes(state[KEY].tolist())) | changes
    return state | {KEY: torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("variant", variants(), ids=label)
@pytest.mark.parametrize(
    ("made_with", "device", "assign"),
    [("hqq", "cpu", False), ("none", "cpu", True), ("nf4", "meta", True)],
)
def test_a_layer_becomes_what_the_state_dict_describes(
    variant, made_with, device, assign, tmp_path
):
    name, options = variant
    source = QuantLinear.from_linear(nn.Linear(45, 10).bfloat16(), quant.get(name, **options))
    save_file(source.state_dict(), tmp_path / "layer.safetensors")
    layer = QuantLinear(45, 10, quantizer=made_with, device=device, dtype=torch.bfloat16)
    layer.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=assign)
    assert same(layer.storage, source.storage)
    assert layer.storage.scheme == name and layer.storage.options == source.storage.options
    assert layer.storage.dtype == torch.bfloat16
    x = torch.randn(3, 45, dtype=torch.bfloat16)
    assert torch.equal(layer(x), source(x))
    assert not any(p.requires_grad for n, p in layer.named_parameters() if n != "bias")
    again = nn.Linear(45, 10)  # the quantizer is the file's too
    layer.load_state_dict(again.state_dict())
    assert same(layer.storage, quant.get(name, **options).quantize(again.weight))


def test_what_is_loaded_does_not_share_memory_with_the_state_dict():
    source = QuantLinear(64, 8, quantizer="fp4")
    layer = QuantLinear(64, 8, quantizer="int8")
    layer.load_state_dict(source.state_dict())
    before = copy.deepcopy(layer.storage)
    source.packed.zero_()
    assert same(layer.storage, before)


def test_the_description_survives_the_meta_device_copies_and_casts():
    layer = QuantLinear(96, 8, quantizer=quant.get("nf4", block_size=32), dtype=torch.float16)
    state = layer.state_dict()[KEY]
    assert state.dtype == torch.uint8 and state.device.type == "cpu"
    text = json.loads(bytes(state.tolist()))
    assert text == {
        "version": 1,
        "scheme": "nf4",
        "options": {"block_size": 32, "double_quant": True},
        "shape": [8, 96],
        "dtype": "float16",
        "tensors": {
            "packed": "uint8",
            "absmax": "uint8",
            "absmax_scale": "float32",
            "codebook": "float32",
        },
    }
    with torch.device("meta"):
        skeleton = QuantLinear(96, 8, quantizer=layer.quantizer, dtype=torch.float16)
        assert torch.equal(skeleton.state_dict()[KEY], state)
    for cast in (copy.deepcopy, lambda m: m.double(), lambda m: m.to("meta")):
        assert torch.equal(cast(copy.deepcopy(layer)).state_dict()[KEY], state)


def test_the_same_tensors_of_another_scheme_are_not_confused():
    fp4 = QuantLinear(64, 8, quantizer="fp4")
    nf4 = QuantLinear(64, 8, quantizer="nf4")
    nf4.load_state_dict(fp4.state_dict())
    assert nf4.storage.scheme == "fp4" and isinstance(nf4.quantizer, type(quant.get("fp4")))
    mine = QuantLinear(64, 8, quantizer=quant.get("codebook", codebook=TABLE))
    rows = quant.get("codebook", codebook=torch.rand(8, 16))
    mine.load_state_dict(QuantLinear(64, 8, quantizer=rows).state_dict())
    assert torch.equal(mine.quantizer.codebook, rows.codebook)


def test_a_strict_load_misses_the_description_and_a_loose_one_does_without():
    source, layer = QuantLinear(64, 8), QuantLinear(64, 8)
    tensors = source.state_dict()
    del tensors[KEY]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{KEY}"'):
        copy.deepcopy(layer).load_state_dict(tensors)
    assert layer.load_state_dict(tensors, strict=False).missing_keys == [KEY]
    assert same(layer.storage, source.storage)


def test_a_description_that_cannot_be_believed_is_refused_and_changes_nothing():
    layer = QuantLinear(64, 8, quantizer="int8")
    model = nn.ModuleDict({"up": layer})
    state, before = QuantLinear(64, 8).state_dict(), copy.deepcopy(layer.storage)
    tensors = dict.fromkeys(["packed", "absmax"], "uint8")
    raw = {
        "JSON that describes": torch.tensor([123], dtype=torch.uint8),
        r"expected JSON as uint8 \[n\]": torch.tensor(7, dtype=torch.uint8),
        r"JSON that describes a quantized weight; got Recursion": torch.full((90000,), 91).byte(),
    }
    cases = [(FileFormatError, match, state | {KEY: value}) for match, value in raw.items()]
    cases += [
        (FileFormatError, "format version up to 1; got 2; .*newer", edited(state, version=2)),
        (FileFormatError, "expected version, scheme", edited(state, version="1")),
        (FileFormatError, "expected one of .*; got 'nf5'", edited(state, scheme="nf5")),
        (FileFormatError, "expected version, scheme", edited(state, scheme=4)),
        (FileFormatError, "expected version, scheme", edited(state, dtype="int8")),
        (FileFormatError, "no dtype", edited(state, dtype="nn")),
        (FileFormatError, "JSON that describes", edited(state, dtype="float33")),
        (FileFormatError, "expected version, scheme", edited(state, shape=[8, -64])),
        (FileFormatError, "block_size", edited(state, options={"block_size": 65})),
        (FileFormatError, "argument 'group'", edited(state, options={"group": 64})),
        (FileFormatError, "expected version, scheme", edited(state, options={"group": [64]})),
        (FileFormatError, "'nf4' cannot read it: KeyError", edited(state, options={})),
        (FileFormatError, "expected the tensors packed, absmax", edited(state, tensors=tensors)),
        (FileFormatError, "CB: expected for nf4", edited(state, tensors={"CB": "int8"})),
        (DtypeError, "absmax: expected torch.uint8", state | {"absmax": torch.zeros(8, 1)}),
        (ShapeError, r"absmax: expected \[8, 1\]", state | {"absmax": state["absmax"][:4]}),
        (ShapeError, r"a weight of \[8, 64\]; got \[8, 63\]", edited(state, shape=[8, 63])),
    ]  # fmt: skip
    cases += [
        (DtypeError, f"{name}: expected a tensor; got NoneType", state | {name: None})
        for name in (KEY, "packed", "weight")
    ]
    for error, match, wrong in cases:
        for strict in (False, True):
            with pytest.raises(error, match=rf"^up\.[a-zA-Z_]+: .*{match}|^up\.{match}"):
                model.load_state_dict({f"up.{k}": v for k, v in wrong.items()}, strict=strict)
    assert same(layer.storage, before) and layer.storage.scheme == "int8"
    assert isinstance(layer.quantizer, type(quant.get("int8")))
    with pytest.raises(FileFormatError, match=r"up\.weight: .*got both"):
        model.load_state_dict({"up.weight": torch.randn(8, 64), f"up.{KEY}": state[KEY]})


def test_a_scheme_that_is_registered_nowhere_loads_into_its_own_kind_alone():
    class Halves:
        row_local = True

        def quantize(self, weight):
            tensors = {"halves": weight.half()}
            return quant.Storage("halves", tuple(weight.shape), weight.dtype, tensors)

        def dequantize(self, storage, dtype=torch.float32):
            return storage["halves"].to(dtype)

    source, layer = (QuantLinear(64, 8, quantizer=Halves()) for _ in range(2))
    layer.load_state_dict(source.state_dict())
    assert same(layer.storage, source.storage)
    with pytest.raises(LowrankError, match="expected one of .*; got 'halves'"):
        QuantLinear(64, 8).load_state_dict(source.state_dict())


def test_an_adapted_layer_adopts_it_too():
    source = QuantLinear(64, 8, quantizer="hqq")
    model = nn.Sequential(lowrank.LoRALinear(64, 8, quantizer="nf4"))
    model.load_state_dict({f"0.{k}": v for k, v in source.state_dict().items()})
    assert same(model[0].base_layer.storage, source.storage)
    again = nn.Sequential(lowrank.LoRALinear(64, 8, quantizer="nf4"))
    again.load_state_dict(model.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))
