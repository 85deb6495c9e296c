"""Adapters that start with a part of the weights, in dense models and in quantized ones."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig, LoRALinear, QuantLinear
from lowrank.errors import ConfigError, DtypeError, LowrankError, ShapeError, WeightError
from tests.adapters.oracle import peft_model, spread_singular_values_, tiny_llama, words
from tests.quant.schemes import same
from tests.surgery.models import assert_unchanged, names_of, refused, state


def config(init="loftq", **options) -> LoRAConfig:
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}
    return LoRAConfig(init_lora_weights=init, **options)


def logits_of_the_sums(model, dense, ids):
    """The answer of `dense` with Q + s·B A in place of each adapted weight."""
    dense = copy.deepcopy(dense).double()
    for name in names_of(model, LoRALinear):
        layer = model.get_submodule(name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        product = layer.scaling["default"] * B.double() @ A.double()
        weight = layer.base_layer.dequantize(torch.float64) + product
        dense.get_submodule(name).weight.data = weight.detach()
    return dense(ids).logits


@pytest.mark.parametrize("init", ["loftq", "pissa", "pissa_niter_2"])
def test_a_dense_model_is_quantized_and_less_is_lost(init, generator):
    dense, ids = tiny_llama(attention_bias=True), words(generator)
    model = lowrank.inject(copy.deepcopy(dense), config(init), quantizer="nf4")
    assert names_of(model, LoRALinear) == names_of(dense, nn.Linear) - {"lm_head"}
    assert names_of(model, QuantLinear) == {f"{n}.base_layer" for n in names_of(model, LoRALinear)}
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    with torch.no_grad():
        got, sums = model(ids).logits, logits_of_the_sums(model, dense, ids)
        assert (got.double() - sums).norm() <= 1e-5 * sums.norm()
        merged = lowrank.merge_and_unload(copy.deepcopy(model))
        torch.testing.assert_close(merged(ids).logits, got, rtol=1e-4, atol=1e-5)
        plain = lowrank.quantize(copy.deepcopy(dense), "nf4")
        for name in names_of(model, LoRALinear):
            weight, sums = (m.get_submodule(name).weight for m in (dense, merged))
            alone = plain.get_submodule(name).dequantize()
            assert (sums - weight).norm() < 0.97 * (alone - weight).norm(), name
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_a_quantized_model_takes_the_same_start_from_the_original_weights(init):
    dense = tiny_llama(attention_bias=True)
    options = config(
        init,
        rank_pattern={"q_proj": 3, r"layers\.1\..*": 5},
        alpha_pattern={"up_proj": 2.5},
        use_rslora=True,
        loftq_config={"loftq_iter": 3},
    )
    wanted = lowrank.inject(copy.deepcopy(dense), options, quantizer="nf4")
    model = lowrank.quantize(copy.deepcopy(dense), "nf4")
    lowrank.inject(model, options, weights=dense.state_dict())
    assert model.state_dict().keys() == wanted.state_dict().keys()
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for name in names_of(model, LoRALinear):
        layer, twin = model.get_submodule(name), wanted.get_submodule(name)
        assert layer.config == twin.config and layer.scaling == twin.scaling
        assert layer.config["default"].init_lora_weights == init


@pytest.mark.parametrize("alpha", [4, 10])
def test_over_an_unquantized_rest_the_logits_are_pefts(alpha, generator):
    dense, ids = tiny_llama(), words(generator)
    for name in names_of(dense, nn.Linear):
        spread_singular_values_(dense.get_submodule(name).weight)
    options = {"r": 4, "lora_alpha": alpha, "target_modules": "all-linear"}
    theirs = peft_model(dense, init_lora_weights="pissa", **options)
    model = lowrank.inject(
        copy.deepcopy(dense), config("pissa", lora_alpha=alpha), quantizer="none"
    )
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
        with lowrank.disable_adapters(model), theirs.disable_adapter():  # the rests agree too
            torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_gpt2s_conv1d_starts_from_its_transposed_weight(generator):
    transformers = pytest.importorskip("transformers")
    size = {"n_embd": 48, "n_layer": 1, "n_head": 2, "vocab_size": 48}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    dense = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **ends)).eval()
    model = lowrank.quantize(copy.deepcopy(dense), "nf2")
    options = config("pissa", r=8, target_modules=["c_attn", "c_fc", "c_proj"])
    lowrank.inject(model, options, weights=dense.state_dict())
    assert len(names_of(model, LoRALinear)) == 4
    for name in names_of(model, LoRALinear):
        layer, conv1d = model.get_submodule(name), dense.get_submodule(name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        sums = layer.base_layer.dequantize() + layer.scaling["default"] * B @ A
        alone = lowrank.QuantLinear.from_linear(conv1d, "nf2").dequantize()
        assert (sums - conv1d.weight.T).norm() < 0.97 * (alone - conv1d.weight.T).norm()
        dense.get_submodule(name).weight.copy_(sums.T)
    ids = words(generator)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


class Counting(Mapping):
    """The weights of a model, each a copy made when asked for; `most` were alive at a time."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors, self.alive, self.most = model.state_dict(), [], 0

    def __getitem__(self, name):
        tensor = self.tensors[name].clone()
        self.alive = [r for r in self.alive if r() is not None] + [weakref.ref(tensor)]
        self.most = max(self.most, len(self.alive))
        return tensor

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_the_weights_are_held_one_at_a_time():
    dense = tiny_llama()
    model, weights = lowrank.quantize(copy.deepcopy(dense), "nf4"), Counting(dense)
    lowrank.inject(model, config(), weights=weights)
    assert weights.most <= 2  # the last one and the next


# VmHWM, since ru_maxrss begins with what the parent held when it forked
PEAK = """
import sys, torch, lowrank
from torch import nn
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
class Weights(dict):
    def __getitem__(self, name):
        torch.manual_seed(int(name.split(".")[0]))
        return torch.randn(K, K)
def start(layers):
    model = nn.Sequential()
    for i in range(layers):
        linear = nn.Linear(K, K, bias=False)
        linear.weight.data = Weights()[f"{i}.weight"]
        model.append(lowrank.QuantLinear.from_linear(linear, "nf4"))
    config = lowrank.LoRAConfig(4, target_modules="all-linear", init_lora_weights="pissa_niter_1")
    before = peak()
    lowrank.inject(model, config, weights=Weights())
    return peak() - before
K = 768
start(2)                                                     # whatever is imported on first use
print(start(60))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_starting_a_quantized_model_takes_a_few_tensors_more():
    command = [sys.executable, "-c", PEAK]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    tensor = 4 * 768 * 768 / 2**20
    assert float(out) < 12 * tensor  # 60 of them would be held by now; the adapters are 1.4 MB


def test_quantized_layers_start_where_they_are():
    """In the same memory, and under the same parameters."""
    dense = tiny_llama()
    model = lowrank.quantize(copy.deepcopy(dense), "nf4")
    before = {n: (p, p.data_ptr()) for n, p in model.named_parameters()}
    lowrank.inject(model, config("pissa"), weights=dense.state_dict())
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            old, place = before[name.replace(".base_layer", "")]
            assert parameter is old and parameter.data_ptr() == place
    # a dense scheme's tensors take the dtype of the weights
    half = lowrank.quantize(copy.deepcopy(dense).bfloat16(), "none")
    lowrank.inject(half, config("pissa", target_modules=["q_proj"]), weights=dense.state_dict())
    base = half.model.layers[0].self_attn.q_proj.base_layer
    assert base.storage["dense"].dtype == torch.float32 and base.weight_dtype == torch.bfloat16


def test_a_layer_that_stands_twice_starts_once():
    linear = nn.Linear(64, 64)
    model = nn.Sequential(linear, nn.Tanh(), linear)
    lowrank.inject(model, config("pissa"), quantizer="nf4")
    assert model[0] is model[2] and isinstance(model[0], LoRALinear)
    assert len(list(model.parameters())) == len(list(model[0].parameters()))


def test_a_quantizer_without_such_a_start():
    dense = tiny_llama()
    quantized = lowrank.quantize(copy.deepcopy(dense), "int4", skip=["lm_head", "k_proj"])
    lowrank.inject(quantized, LoRAConfig(target_modules=["q_proj", "k_proj"]), quantizer="nf4")
    attention = quantized.model.layers[0].self_attn
    assert attention.k_proj.base_layer.storage.scheme == "nf4"  # was not quantized yet
    assert attention.q_proj.base_layer.storage.scheme == "int4"
    assert attention.k_proj.lora_B["default"].weight.count_nonzero() == 0
    again = lowrank.quantize(dense, "nf4")
    wanted = again.model.layers[0].self_attn.k_proj.storage
    assert same(attention.k_proj.base_layer.storage, wanted)


@pytest.mark.parametrize("init", ["loftq", True])
def test_a_bad_weight_is_named_and_nothing_changes(init):
    model = tiny_llama(attention_bias=True)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("inf")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = list(model.modules())
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: .* row 3"):
        lowrank.inject(model, config(init), quantizer="nf4")
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def changed(dense: nn.Module, name: str, weight: torch.Tensor | None) -> dict:
    weights = dict(dense.state_dict())
    weights[name] = weight
    return {k: v for k, v in weights.items() if v is not None}


def test_weights_that_are_not_the_originals_change_nothing():
    dense = tiny_llama()
    model = lowrank.quantize(copy.deepcopy(dense), "nf4")
    name = "model.layers.1.mlp.up_proj.weight"
    good = dense.state_dict()[name]
    for weight, kind, match in (
        (None, ConfigError, "expected .*up_proj.weight among them; it is missing"),
        (good[:-1], ShapeError, r"up_proj.weight: expected \[40, 24\]; got \[39, 24\]"),
        (good.char(), DtypeError, "up_proj.weight: expected the unquantized weight, in floats"),
        (good / 0, WeightError, "up_proj.weight: expected finite values"),
        (good.flip(0), WeightError, "up_proj.weight: expected the weight that the layer was"),
    ):
        with refused(model, kind, match):
            lowrank.inject(model, config(), weights=changed(dense, name, weight))


def test_wrong_requests_change_nothing():
    dense = tiny_llama()
    quantized = lowrank.quantize(copy.deepcopy(dense), "nf4")
    adapted = lowrank.inject(copy.deepcopy(dense), LoRAConfig(target_modules=["q_proj"]))
    started = lowrank.inject(copy.deepcopy(dense), config("pissa"), quantizer="nf4")
    tied = copy.deepcopy(dense)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    both = lowrank.quantize(copy.deepcopy(tied), "nf4", skip=[], embeddings=True)
    weights, targets = dense.state_dict(), {"target_modules": ["q_proj"]}
    for model, options, arguments, match in (
        (
            dense,
            {},
            {},
            "expected a quantizer for model.layers.0.*; got None; pass quantizer='nf4'",
        ),
        (dense, {}, {"weights": weights}, "expected a quantizer for model.layers.0"),
        (quantized, {}, {}, r"the original weight of .*; pass weights=lowrank\.open_weights"),
        (quantized, {}, {"quantizer": "nf4"}, "the original weight of .* is quantized already"),
        (quantized, {"init": True}, {"weights": weights}, "weights: expected None, .*=True"),
        (dense, {"lora_alpha": 0}, {"quantizer": "nf4"}, "lora_alpha: expected .* other than 0"),
        (dense, {}, {"quantizer": "nf5"}, "nf5"),
        (adapted, targets, {"quantizer": "nf4"}, "targets without adapters.*q_proj has default"),
        (adapted, {"init": True, **targets}, {"quantizer": "nf4"}, "call lowrank.quantize first"),
        (adapted, {"init": "pissa", "target_modules": ["v_proj"]}, {"quantizer": "nf4"}, "alone"),
        (started, {"init": True, **targets}, {}, "'default': has the principal part"),
        (tied, {"target_modules": ["lm_head"]}, {"quantizer": "nf4"}, "is also .*embed_tokens"),
        (both, {"target_modules": ["lm_head"]}, {"weights": weights}, "is also .*embed_tokens"),
    ):
        with refused(model, LowrankError, match):
            lowrank.inject(model, config(**options), adapter="b", **arguments)
    before = state(started)
    with pytest.raises(ConfigError, match="principal part .* merge_and_unload gives it back"):
        lowrank.delete_adapter(started, "default")
    assert_unchanged(started, before)


def test_loftqs_adapter_can_go_and_leaves_a_model(generator):
    dense, ids = tiny_llama(), words(generator)
    model = lowrank.inject(copy.deepcopy(dense), config(), quantizer="nf4")
    lowrank.delete_adapter(model, "default")
    plain = lowrank.quantize(dense, "nf4")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
