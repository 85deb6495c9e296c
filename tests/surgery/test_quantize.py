"""Quantizing the linear layers of a model in place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig, QuantLinear
from lowrank.errors import ConfigError, LowrankError, WeightError
from tests.adapters.oracle import tiny_llama, words
from tests.surgery.models import names_of


def test_quantized_weights_count_as_weights(capsys):
    model = tiny_llama()
    total = sum(p.numel() for p in model.parameters())
    lowrank.quantize(model, "nf4", double_quant=True)
    dense = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    assert lowrank.count_parameters(model) == (dense, total)
    lowrank.inject(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    added = 2 * 2 * (24 + 24)
    lowrank.print_trainable_parameters(model)
    line = f"trainable params: {added:,d} || all params: {total + added:,d} || "
    assert capsys.readouterr().out.startswith(line)


def test_quantize_replaces_linears_in_place(generator):
    model, ids = tiny_llama(), words(generator)
    dense = copy.deepcopy(model)
    assert lowrank.quantize(model, "nf4", double_quant=False) is model
    assert names_of(model, QuantLinear) == {n for n in names_of(dense, nn.Linear) if n != "lm_head"}
    storage = model.model.layers[0].mlp.up_proj.storage
    assert storage.options["double_quant"] is False
    for name in names_of(model, QuantLinear):
        dense.get_submodule(name).weight.data = model.get_submodule(name).dequantize(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


def test_quantize_under_adapters_and_with_skip():
    model = lowrank.inject(tiny_llama(), LoRAConfig(target_modules=["q_proj"]))
    lowrank.quantize(model, skip=["lm_head", "layers.0.mlp.up_proj", "k_proj"])
    assert isinstance(model.model.layers[0].self_attn.q_proj.base_layer, QuantLinear)
    A = model.model.layers[0].self_attn.q_proj.lora_A["default"]
    assert [(n, p.dtype) for n, p in A.named_parameters()] == [("weight", torch.float32)]
    kept = {n for n in names_of(model, nn.Linear) if "lora_" not in n}
    assert kept == {"lm_head", "model.layers.0.mlp.up_proj"} | {
        f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_quantize_refuses_a_bad_weight_by_name(bad):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = bad
    modules = [n for n, _ in model.named_modules()]
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.down_proj"):
        lowrank.quantize(model)
    assert [n for n, _ in model.named_modules()] == modules and not names_of(model, QuantLinear)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quantizer": "nf5"}, "nf5"),
        ({"skip": ["q_prj"]}, "q_proj"),
        ({"skip": "lm_head"}, "skip: expected a sequence of names; got the string 'lm_head'"),
        (
            {
                "skip": [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
                + ["lm_head"]
            },
            "skip",
        ),
        ({"skip": None}, "skip: expected a sequence of names; got None"),
        ({"skip": ["lm_head", 3]}, r"skip: expected a sequence of names; got \['lm_head', 3\]"),
        ({"quantizer": lowrank.quant.Fitted}, "^quantizer: expected a name or an object with"),
        ({"quantizer": lowrank.quant.get("nf4"), "double_quant": True}, "double_quant"),
    ],
)
def test_quantize_refuses_wrong_requests(options, match):
    model = tiny_llama()
    with pytest.raises(LowrankError, match=match):
        lowrank.quantize(model, **options)
    assert not names_of(model, QuantLinear)


@pytest.mark.parametrize("model", [None, "SmolLM2", torch.randn(4, 4), {}])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ConfigError, match="model: expected an nn.Module; got .*; lowrank.load_mo"):
        lowrank.quantize(model)


def test_quantize_refuses_a_tied_head_that_is_not_skipped():
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ConfigError, match="lm_head.*skip"):
        lowrank.quantize(model, skip=[])
