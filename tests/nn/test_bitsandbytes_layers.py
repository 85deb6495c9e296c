"""State dicts of bitsandbytes' modules load into ours: exactly, or not at all."""

import copy

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from lowrank import LoRALinear, QuantLinear, quant
from lowrank.errors import FileFormatError, LowrankError, ShapeError
from lowrank.nn.quant_experts import QuantExperts
from lowrank.quant import bitsandbytes as ours
from tests.ops.oracle import assert_near, linear
from tests.quant.bnb_damage import damaged
from tests.quant.bnb_layers import F, bnb, dequantized, layer_tensors, same_bits
from tests.quant.schemes import same
from tests.surgery.training import assert_merges_and_back, train

SHAPES = [(8, 128), (6, 80), (5, 33)]


def linear4bit(K, N, bias=True, **options):
    layer = bnb.nn.Linear4bit(K, N, bias=bias, **options)
    return layer.to("cpu")


def weight_of(state):
    """What bitsandbytes multiplies by."""
    if "SCB" in state:
        # its modules copy SCB into float32
        return F.int8_vectorwise_dequant(state["weight"], state["SCB"].float())
    return dequantized({key: t for key, t in state.items() if ours.is_key(key)})


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("made_with", ["nf4", "int8", "flat", "none"])
def test_a_layer_takes_each_state_dict_exactly(made_with, strict):
    for N, K in SHAPES:
        kinds = [
            linear4bit(K, N, quant_type=kind, compress_statistics=nested, quant_storage=storage)
            for kind in ("nf4", "fp4")
            for nested in (False, True)
            for storage in (torch.uint8, torch.bfloat16)
            if -(-N * K // 2) % storage.itemsize == 0
        ]
        kinds += [bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False).to("cpu")]
        for theirs in kinds:
            state, layer = theirs.state_dict(), QuantLinear(K, N, quantizer=made_with)
            outcome = layer.load_state_dict(state, strict=strict)
            assert not outcome.missing_keys and not outcome.unexpected_keys
            expected = weight_of(state)
            assert torch.equal(layer.dequantize(), expected)
            assert torch.equal(layer.bias, theirs.bias)
            assert layer.storage.scheme == layer.quantizer.name
            x, dy = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
            y = layer(x)
            got = (y, *torch.autograd.grad(y, (x, layer.bias), dy))
            assert_near(got, linear, (x, expected, theirs.bias, dy), 2e-6)
            again = QuantLinear(K, N, quantizer="nf4")
            again.load_state_dict(layer.state_dict(), strict=strict)  # now our own
            assert same(again.storage, layer.storage)
            assert torch.equal(again.dequantize(), expected)
            plain = nn.Linear(K, N)
            again.load_state_dict(plain.state_dict())
            assert same(again.storage, layer.quantizer.quantize(plain.weight))


@pytest.mark.parametrize("assign", [False, True])
def test_whole_models_under_prefixes_and_onto_a_meta_skeleton(assign, tmp_path):
    theirs = nn.Sequential(
        linear4bit(64, 80),
        nn.ModuleDict({"up": linear4bit(80, 24, bias=False), "norm": nn.LayerNorm(24)}),
        bnb.nn.Linear8bitLt(24, 9, has_fp16_weights=False).to("cpu"),
    )
    with torch.device("meta"):
        model = nn.Sequential(
            QuantLinear(64, 80),
            nn.ModuleDict({"up": QuantLinear(80, 24, bias=False), "norm": nn.LayerNorm(24)}),
            QuantLinear(24, 9),
        )
    if not assign:
        model.to_empty(device="cpu")
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    model.load_state_dict(state, assign=assign)
    assert not any(p.is_meta for p in model.parameters())
    layers = (model[0], model[1]["up"], model[2])
    assert [layer.storage.scheme for layer in layers] == ["fp4", "flat", "int8"]
    for prefix, layer in zip(("0.", "1.up.", "2."), layers, strict=True):
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        assert torch.equal(layer.dequantize(), weight_of(own))
    assert torch.equal(model[1]["norm"].weight, theirs[1]["norm"].weight)
    before = [layer.dequantize() for layer in layers]
    for tensor in state.values():  # what was copied shares no memory
        tensor.zero_()
    if not assign:
        after = [layer.dequantize() for layer in layers]
        assert all(map(torch.equal, before, after))


def test_lora_over_a_layer_of_theirs_trains_merges_and_reloads(tmp_path):
    theirs = nn.Sequential(linear4bit(80, 32), nn.Tanh(), linear4bit(32, 6))
    layers = [QuantLinear(80, 32), nn.Tanh(), QuantLinear(32, 6)]
    model = nn.Sequential(*layers)
    model.load_state_dict(theirs.state_dict())
    assert model[0].storage.scheme == "flat" and model[2].storage.scheme == "flat"
    frozen = copy.deepcopy(model[0].storage)
    lowrank.inject(model, lowrank.LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    x, target = torch.randn(64, 80), torch.randn(64, 6)
    losses = train(model, lambda: nn.functional.mse_loss(model(x), target), 10, 2e-2)
    assert losses[-1] < 0.9 * losses[0] and same(model[0].base_layer.storage, frozen)
    assert_merges_and_back(model, x)
    written = ours.write(model[0].base_layer.storage)
    state = theirs[0].state_dict()
    assert all(same_bits(written[key], state[key]) for key in written)


def test_a_plain_lora_layer_takes_their_keys_into_its_base():
    theirs = linear4bit(64, 8)
    layer = LoRALinear(64, 8, config=lowrank.LoRAConfig(r=2), quantizer="nf4")
    layer.load_state_dict(theirs.state_dict())
    assert torch.equal(layer.base_layer.dequantize(), weight_of(theirs.state_dict()))


def test_another_shape_is_refused_by_name_and_changes_nothing():
    tensors, _ = layer_tensors(torch.randn(32, 64))
    model = nn.ModuleDict({"proj": QuantLinear(32, 64, bias=False)})
    before = copy.deepcopy(model["proj"].storage)
    message = r"proj\.weight: expected a weight of \[64, 32\]; got \[32, 64\]"
    with pytest.raises(ShapeError, match=message):
        model.load_state_dict({f"proj.{k}": v for k, v in tensors.items()})
    assert same(model["proj"].storage, before)


@pytest.mark.parametrize("strict", [True, False])
def test_half_a_layer_and_two_kinds_at_once_are_refused(strict):
    theirs, int8 = linear4bit(64, 8), bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=False).to("cpu")
    four, eight = theirs.state_dict(), int8.state_dict()
    for made_with in ("nf4", "int8", "flat"):
        layer = QuantLinear(64, 8, quantizer=made_with)
        before, own = copy.deepcopy(layer.storage), layer.state_dict()
        name = next(iter(layer.storage.tensors))
        cases = {
            "weight: missing": without(four, "weight"),
            "weight.absmax: missing": without(four, "weight.absmax"),
            "weight: expected one of": {"weight.absmax": four["weight.absmax"]},
            "SCB: missing": without(eight, "SCB"),
            "expected beside weight only": four | {"SCB": eight["SCB"]},
            "weight: expected it or the quantized tensors": four | {name: own[name]},
        }
        for match, state in cases.items():
            with pytest.raises(FileFormatError, match=match):
                layer.load_state_dict(state, strict=strict)
            assert same(layer.storage, before) and layer.quantizer.name == made_with


@hypothesis.settings(
    max_examples=200, deadline=None, database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
@hypothesis.given(st.data())
def test_a_damaged_state_dict_never_leaves_a_layer_with_other_weights(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    N, K = data.draw(st.sampled_from([(8, 64), (6, 80)]))
    made_with = data.draw(st.sampled_from(["nf4", "int8", "flat"]))
    if data.draw(st.booleans()):
        tensors, _ = layer_tensors(torch.randn(N, K), "nf4", data.draw(st.booleans()))
    else:
        tensors = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
        tensors = tensors.to("cpu").state_dict()
    found = data.draw(damaged(tensors))
    layer = QuantLinear(K, N, bias=False, quantizer=made_with)
    before = copy.deepcopy(layer.storage)
    try:
        outcome = layer.load_state_dict(found, strict=data.draw(st.booleans()))
    except (LowrankError, RuntimeError):
        assert same(layer.storage, before)
        return
    if outcome.missing_keys:  # not strict, and torch says what is missing
        assert same(layer.storage, before)
        return
    expected = weight_of(found)
    assert torch.equal(layer.dequantize(expected.dtype), expected)


class Experts(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.up = nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("K", [64, 80])
def test_experts_that_bitsandbytes_has_quantized_as_a_parameter(K, nested):
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    theirs = nn.ModuleDict({"experts": Experts((4, 6, K))})
    replace_parameter_4bit(theirs["experts"], "up", compress_statistics=nested, quant_type="nf4")
    state = theirs.state_dict()
    own = {k.replace("experts.up", "weight"): v for k, v in state.items()}
    model = lowrank.quantize(nn.ModuleDict({"experts": Experts((4, 6, K))}), "int8")
    with pytest.raises((LowrankError, RuntimeError), match=r"experts\.up"):
        half = {k: v for k, v in state.items() if not k.endswith("quant_map")}
        model.load_state_dict(half)
    model.load_state_dict(state)
    experts = model["experts"].up
    assert experts.storage.scheme == ("flat" if K % 64 else "nf4")
    assert torch.equal(experts.dequantize(), dequantized(own))
    x = torch.randn(3, K)
    torch.testing.assert_close(x @ experts[2].mT, x @ dequantized(own)[2].T)
    again = lowrank.quantize(nn.ModuleDict({"experts": Experts((4, 6, K))}), "fp4")
    again.load_state_dict(model.state_dict())
    assert same(again["experts"].up.storage, experts.storage)
    turned = QuantExperts(torch.randn(4, 6, K), transposed=True)
    with pytest.raises(FileFormatError, match="held transposed"):
        turned.load_state_dict(own)


class Conv1D(nn.Module):
    """GPT-2's linear layer, as transformers has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


def test_gpt2s_layers_which_transformers_turns_before_bitsandbytes_has_them():
    for N, K in ((24, 64), (64, 64), (10, 80)):
        theirs = linear4bit(K, N)
        model = lowrank.quantize(nn.Sequential(Conv1D(N, K)), "int8")
        model.load_state_dict({f"0.{key}": t for key, t in theirs.state_dict().items()})
        x = torch.randn(3, K)
        expected = x @ weight_of(theirs.state_dict()).T + theirs.bias
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_scales_in_8_bits_by_name():
    theirs = linear4bit(4096, 16, quant_type="nf4")
    layer = QuantLinear(4096, 16)
    layer.load_state_dict(theirs.state_dict())
    assert layer.storage.bits_per_parameter == pytest.approx(4.5, abs=0.01)
    exact = layer.dequantize()
    layer.storage = quant.requantize_scales(layer.storage)
    assert layer.storage.bits_per_parameter == pytest.approx(4.14, abs=0.02)
    assert (layer.dequantize() - exact).norm() < 0.004 * exact.norm()
    again = QuantLinear(4096, 16, quantizer="int8")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dequantize(), layer.dequantize())
    weight = torch.randn(16, 4096)
    layer.load_state_dict({"weight": weight, "bias": layer.bias})  # they stay so
    mine = quant.get("nf4", double_quant=True)
    assert layer.storage.options["double_quant"]
    assert torch.equal(layer.dequantize(), mine.dequantize(mine.quantize(weight)))


def without(state, key):
    return {k: v for k, v in state.items() if k != key}
