"""Any module with quantized layers: saved, and loaded into whatever stands there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from lowrank import quant
from lowrank.errors import ConfigError, FileFormatError, LowrankError

transformers = pytest.importorskip("transformers", reason="has Conv1D; pip install transformers")

SINGLE = "model.safetensors"


class Net(nn.Module):
    """What a stranger might write: a tied table, a norm, a buffer, linears, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(37, 96)
        self.up = nn.Linear(96, 130)
        self.inner = nn.ModuleDict({"down": nn.Linear(130, 96, bias=False)})
        self.norm = nn.LayerNorm(96)
        self.again = self.inner["down"]
        self.register_buffer("shift", torch.randn(96))
        self.head = nn.Linear(96, 37, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        h = self.table(ids)
        for down in (self.inner["down"], self.again):
            h = h + down(torch.relu(self.up(self.norm(h + self.shift))))
        return self.head(h)


def quantizer(name):
    return quant.CodebookQuantizer(torch.rand(16)) if name == "codebook" else quant.get(name)


def quantized(name="nf4"):
    return lowrank.quantize(Net(), quantizer(name), skip=["head"])


def on_meta():
    with torch.device("meta"):
        return Net()


def bits(model):
    return {n: (type(t), t.dtype, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name, (kind, dtype, tensor) in want.items():
        assert got[name][:2] == (kind, dtype) and torch.equal(got[name][2], tensor), name


INTO = {
    "dense": Net,
    "on meta": on_meta,
    "int8": lambda: quantized("int8"),
    "fitted": lambda: quantized("fitted"),
}


@pytest.mark.parametrize(
    ("scheme", "into", "shard"),
    [
        *((scheme, "on meta", 10**9) for scheme in quant.names()),
        *((scheme, into, 4_000) for scheme in ("nf4", "codebook") for into in INTO),
    ],
)
def test_what_was_saved_comes_back_bit_for_bit(tmp_path, scheme, into, shard):
    model, ids = quantized(scheme).eval(), torch.randint(0, 37, (3, 5))
    lowrank.save_quantized(model, tmp_path / "x", max_shard_bytes=shard)
    assert (len(list((tmp_path / "x").glob("*.safetensors"))) > 1) == (shard == 4_000)
    fresh = INTO[into]()
    assert lowrank.load_quantized(fresh, tmp_path / "x") is fresh
    assert_same_bits(bits(fresh), bits(model))
    assert fresh.head.weight is fresh.table.weight and fresh.again is fresh.inner["down"]
    assert torch.equal(fresh(ids), model(ids))
    assert fresh.up.quantizer.__class__ is model.up.quantizer.__class__
    assert [n for n, p in fresh.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("scheme", ["nf4", "hqq", "int8", "nf3"])
def test_the_file_is_the_state_dict_for_ordinary_loading(tmp_path, scheme):
    model = lowrank.quantize(nn.Sequential(nn.Linear(96, 48), nn.Linear(48, 7)), scheme)
    lowrank.save_quantized(model, tmp_path)
    tensors, state = load_file(tmp_path / SINGLE), model.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[n], state[n]) for n in state)
    other = lowrank.quantize(nn.Sequential(nn.Linear(96, 48), nn.Linear(48, 7)), "int4")
    other.load_state_dict(tensors)
    x = torch.randn(5, 96)
    assert torch.equal(other(x), model(x))


def test_a_tied_tensor_is_stored_once(tmp_path):
    lowrank.save_quantized(quantized(), tmp_path)
    names = load_file(tmp_path / SINGLE).keys()
    assert {"table.weight", "inner.down.packed", "inner.down._extra_state", "shift"} <= names
    assert not [n for n in names if n.startswith(("head", "again"))]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 48, 64))
        self.bias = nn.Parameter(torch.randn(3, 48))


def mixture():
    conv = transformers.pytorch_utils.Conv1D(72, 64)
    conv.bias.data.normal_()
    return nn.ModuleDict({"conv": conv, "table": nn.Embedding(11, 40), "experts": Experts()})


def test_what_is_no_linear_layer(tmp_path):
    """GPT-2's layers and tables take the place of dense ones, experts that of quantized ones."""
    model = lowrank.quantize(mixture(), "int4", embeddings=True)
    lowrank.save_quantized(model, tmp_path)
    with pytest.raises(
        FileFormatError, match=r"experts\.up: is quantized; .* got none; lowrank\.q"
    ):
        lowrank.load_quantized(mixture(), tmp_path)
    with torch.device("meta"):
        empty = mixture()
    for into in (mixture(), empty):
        fresh = lowrank.quantize(into, "nf4", skip=["conv", "table"])
        lowrank.load_quantized(fresh, tmp_path)
        assert_same_bits(bits(fresh), bits(model))
        x, ids = torch.randn(5, 64), torch.tensor([3, 10])
        assert torch.equal(fresh["conv"](x), model["conv"](x))
        assert torch.equal(fresh["table"](ids), model["table"](ids))
        assert torch.equal(x @ fresh["experts"].up[1].T, x @ model["experts"].up[1].T)


def test_adapters_come_along(tmp_path):
    config = lowrank.LoRAConfig(r=4, target_modules=["up"])
    model = lowrank.inject(quantized(), config)
    nn.init.normal_(model.up.lora_B["default"].weight)
    lowrank.save_quantized(model, tmp_path)
    fresh, ids = lowrank.inject(Net(), config), torch.randint(0, 37, (3, 5))
    lowrank.load_quantized(fresh, tmp_path)
    assert torch.equal(fresh(ids), model(ids))
    fresh(ids).sum().backward()
    assert fresh.up.lora_A["default"].weight.grad.abs().sum() > 0


def test_what_is_there_is_not_overwritten(tmp_path):
    lowrank.save_quantized(quantized(), tmp_path / "x")
    before = (tmp_path / "x" / SINGLE).read_bytes()
    with pytest.raises(ConfigError, match="expected no weights there; found model.safetensors"):
        lowrank.save_quantized(quantized(), tmp_path / "x")
    assert (tmp_path / "x" / SINGLE).read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="expected a directory or nothing there; it is a file"):
        lowrank.save_quantized(quantized(), tmp_path / "file")
    with pytest.raises(ConfigError, match="max_shard_bytes"):
        lowrank.save_quantized(quantized(), tmp_path / "y", max_shard_bytes=0)


def test_one_layer_alone_has_its_own_load_state_dict(tmp_path):
    layer = lowrank.QuantLinear(96, 48)
    lowrank.save_quantized(layer, tmp_path)
    with pytest.raises(FileFormatError, match="expected a model of several modules"):
        lowrank.load_quantized(lowrank.QuantLinear(96, 48), tmp_path)
    other = lowrank.QuantLinear(96, 48, quantizer="int4")
    other.load_state_dict(load_file(tmp_path / SINGLE))
    assert torch.equal(other.dequantize(), layer.dequantize())


def edit(directory, **changes):
    """Each value a tensor, None to leave it out, or a function of the old one."""
    tensors = load_file(directory / SINGLE)
    for name, value in changes.items():
        if callable(value):
            value = value(tensors[name])
        tensors[name] = value
    save_file({n: t for n, t in tensors.items() if t is not None}, directory / SINGLE)


def describe(**changes):
    """A change to a description: its JSON with other values."""

    def change(tensor):
        text = json.loads(bytes(tensor.tolist())) | changes
        return torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)

    return change


def cut(directory, n_bytes):
    path = directory / SINGLE
    path.write_bytes(path.read_bytes()[:n_bytes])


UP = "up._extra_state"
DAMAGES = {
    "truncated": (lambda d: cut(d, -1), "expected .* bytes"),
    "cut in the header": (lambda d: cut(d, 300), "truncated"),
    "nothing": (lambda d: (d / SINGLE).unlink(), "found neither"),
    "no codes": (
        lambda d: edit(d, **{"up.packed": None}),
        r"(missing tensors: up\.packed|up\.packed: expected .* missing)",
    ),
    "no bias": (lambda d: edit(d, **{"up.bias": None}), r"missing tensors: up\.bias"),
    "no description": (
        lambda d: edit(d, **{UP: None}),
        r"missing tensors: up\.(weight|_extra_state)",
    ),
    "no norm": (lambda d: edit(d, **{"norm.weight": None}), r"missing tensors: norm\.weight"),
    "no table": (lambda d: edit(d, **{"table.weight": None}), r"missing tensors: table\.weight"),
    "a stray": (lambda d: edit(d, stray=torch.ones(3)), "unexpected tensors: stray"),
    "a stray in a layer": (
        lambda d: edit(d, **{"up.stray": torch.ones(3)}),
        r"unexpected tensors: up\.stray",
    ),
    "a layer that the model lacks": (
        lambda d: edit(d, **{f"side.{UP}": describe()(load_file(d / SINGLE)[UP])}),
        r"side\.up: is quantized; expected a linear layer or an embedding of this name; got none",
    ),
    "no linear layer": (
        lambda d: edit(d, **{"norm._extra_state": load_file(d / SINGLE)[UP]}),
        "norm: is quantized; expected a linear layer or an embedding of this name; got LayerNorm",
    ),
    "an unknown scheme": (lambda d: edit(d, **{UP: describe(scheme="nf5")}), r"up\..*'nf5'"),
    "a newer version": (lambda d: edit(d, **{UP: describe(version=9)}), r"up\..*got 9; it needs"),
    "another shape": (lambda d: edit(d, **{UP: describe(shape=[96, 130])}), r"up\..*\[130, 96\]"),
    "another block size": (
        lambda d: edit(d, **{UP: describe(options={"block_size": 32, "double_quant": True})}),
        r"up\.absmax: expected \[130, 3\].*got \[130, 2\]",
    ),
    "an unknown option": (
        lambda d: edit(d, **{UP: describe(options={"blocks": 32})}),
        r"up\..*'blocks'",
    ),
    "no JSON": (lambda d: edit(d, **{UP: lambda t: t[:-5]}), r"up\._extra_state: expected JSON"),
    "codes of another dtype": (
        lambda d: edit(d, **{"up.packed": lambda t: t.int()}),
        r"up\.packed: expected torch\.uint8.*got torch\.int32",
    ),
    "scales of another dtype": (
        lambda d: edit(d, **{"up.absmax_scale": lambda t: t.view(torch.float32).clone()}),
        r"up\.absmax_scale: expected torch\.int32.*got torch\.float32",
    ),
    "codes cut": (
        lambda d: edit(d, **{"up.packed": lambda t: t[:-1].clone()}),
        r"up\.packed: expected \[130, 48\].*got \[129, 48\]",
    ),
    "a bias cut": (
        lambda d: edit(d, **{"up.bias": lambda t: t[:-1].clone()}),
        r"up: .*bias",
    ),
    "a norm cut": (
        lambda d: edit(d, **{"norm.bias": lambda t: t[:-1].clone()}),
        r"norm\.bias: expected shape \(96,\); got \(95,\)",
    ),
    "a norm of integers": (
        lambda d: edit(d, **{"norm.bias": lambda t: t.int()}),
        r"norm\.bias: expected torch\.float32; got torch\.int32",
    ),
}


@pytest.mark.parametrize("into", ["dense", "fitted"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_and_the_model_is_as_it_was(tmp_path, damage, into):
    lowrank.save_quantized(quantized(), tmp_path)
    harm, says = DAMAGES[damage]
    harm(tmp_path)
    model = INTO[into]()
    before, modules = bits(model), list(model.modules())
    with pytest.raises(LowrankError, match=says) as caught:
        lowrank.load_quantized(model, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert_same_bits(bits(model), before)
    assert list(model.modules()) == modules


@pytest.mark.parametrize("harm", ["shard cut", "shard gone", "tensor gone", "no index"])
def test_damaged_shards_are_refused_and_the_model_is_as_it_was(tmp_path, harm):
    lowrank.save_quantized(quantized(), tmp_path, max_shard_bytes=4_000)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    last = tmp_path / sorted(content["weight_map"].values())[-1]
    if harm == "shard cut":
        last.write_bytes(last.read_bytes()[:-3])
    elif harm == "shard gone":
        last.unlink()
    elif harm == "tensor gone":
        content["weight_map"]["up.packed"] = content["weight_map"]["table.weight"]
        assert content["weight_map"]["up.packed"] != content["weight_map"]["up.absmax"]
        index.write_text(json.dumps(content))
    else:
        index.unlink()
    model = Net()
    before = bits(model)
    with pytest.raises(FileFormatError, match=str(tmp_path)):
        lowrank.load_quantized(model, tmp_path)
    assert_same_bits(bits(model), before)
