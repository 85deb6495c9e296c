"""The tutorials' words: load_in_4bit and its kin, BitsAndBytesConfig, prepare_for_kbit_training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import ConfigError
from lowrank.models.config import DecoderConfig
from lowrank.models.decoder import Decoder
from lowrank.surgery.checkpointing import is_checkpointing
from tests.adapters.oracle import tiny_llama, transformers, words
from tests.io.adapters import shake
from tests.surgery.models import assert_unchanged, refused, state

BF16 = torch.bfloat16
SAID = {
    "fp4": ({"load_in_4bit": True}, "fp4", False, None),
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4", False, None),
    "qlora": (
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": BF16,
        },
        "nf4",
        True,
        BF16,
    ),
    "by name": (
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
        "fp4",
        False,
        BF16,
    ),
    "int8": ({"load_in_8bit": True}, "int8", None, None),
}


def same(one: nn.Module, two: nn.Module) -> None:
    here, there = one.state_dict(), two.state_dict()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    layers = [[m for m in x.modules() if isinstance(m, lowrank.QuantLinear)] for x in (one, two)]
    assert layers[0] and len(layers[0]) == len(layers[1])
    for a, b in zip(*layers, strict=True):
        assert a.compute_dtype == b.compute_dtype and a.storage.options == b.storage.options


@pytest.mark.parametrize(("said", "scheme", "double", "compute"), SAID.values(), ids=SAID)
@pytest.mark.parametrize("in_an_object", [False, True])
def test_words_mean_what_they_do_in_transformers(
    said, scheme, double, compute, in_an_object, tmp_path
):
    base = tiny_llama()
    ours = lowrank.quantize(copy.deepcopy(base), scheme, double_quant=double, compute_dtype=compute)
    if in_an_object:
        config = transformers.BitsAndBytesConfig(**said)
        if compute is None and "load_in_4bit" in said:  # theirs has a default, float32
            for layer in ours.modules():
                if isinstance(layer, lowrank.QuantLinear):
                    layer.compute_dtype = torch.float32
        said = {"quantization_config": config}
    same(lowrank.quantize(copy.deepcopy(base), **said), ours)
    base.save_pretrained(tmp_path)
    loaded = lowrank.load_model(tmp_path, **said)
    for name, layer in loaded.named_modules():
        if isinstance(layer, lowrank.QuantLinear):
            same(layer, ours.get_submodule(name))


def test_modules_that_a_config_leaves_as_they_are():
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_skip_modules=["o_proj"], llm_int8_threshold=4.0
    )
    model = lowrank.quantize(tiny_llama(), quantization_config=config)
    attention = model.model.layers[0].self_attn
    assert type(attention.o_proj) is nn.Linear and type(model.lm_head) is nn.Linear
    assert isinstance(attention.q_proj, lowrank.QuantLinear)
    again = lowrank.quantize(tiny_llama(), quantization_config=config.to_dict())
    assert type(again.model.layers[0].self_attn.o_proj) is nn.Linear


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "expected one of them; got both"),
        ({"bnb_4bit_quant_type": "nf4"}, "got neither, and bnb_4bit_quant_type"),
        ({"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}, "belongs to load_in_4bit"),
        ({"quantizer": "nf4", "load_in_4bit": True}, "expected no quantizer beside it; got 'nf4'"),
        ({"load_in_4bit": True, "double_quant": True}, "double_quant: expected None"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"},
            "expected 'fp4' or 'nf4'; got 'nf5'",
        ),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, "expected a float dtype"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "bf61"}, "float dtype; got 'bf61'"),
        (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": BF16, "compute_dtype": torch.float32},
            "expected compute_dtype's, torch.float32",
        ),
        ({"quantization_config": {}}, "expected load_in_4bit or load_in_8bit in it"),
        ({"quantization_config": {"bits": 4}}, "expected load_in_4bit or load_in_8bit in it"),
        (
            {"quantization_config": {"load_in_4bit": True}, "load_in_4bit": True},
            "expected in quantization_config or beside it",
        ),
    ],
)
def test_words_that_contradict_each_other(said, match):
    model = tiny_llama()
    with refused(model, ConfigError, match):
        lowrank.quantize(model, **said)


def decoder() -> nn.Module:
    return Decoder(DecoderConfig.from_hf(tiny_llama().config.to_dict()))


def gradients(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model.loss(ids, ids) if isinstance(model, Decoder) else model(ids, labels=ids).loss
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("make", [tiny_llama, decoder])
@pytest.mark.parametrize("embeddings", [False, True])
def test_a_prepared_model_trains_as_any_other(make, embeddings, generator):
    model, ids = lowrank.quantize(make(), "nf4", embeddings=embeddings).train(), words(generator)
    plain = copy.deepcopy(model)
    config = LoRAConfig(r=4, target_modules="all-linear")
    assert lowrank.prepare_for_kbit_training(model) is model
    assert not any(p.requires_grad for p in model.parameters())
    assert is_checkpointing(model) and not is_checkpointing(plain)
    lowrank.inject(model, config)
    shake(model)
    lowrank.inject(plain, config)
    plain.load_state_dict(model.state_dict())
    mine, theirs = gradients(model, ids), gradients(plain, ids)
    assert mine.keys() == theirs.keys() and len(mine) > 20
    for name, grad in mine.items():
        assert grad.any(), name
        torch.testing.assert_close(grad, theirs[name], rtol=1e-5, atol=1e-6)


def test_norms_are_upcast_if_asked_and_nothing_else():
    for upcast in (False, True):
        model = lowrank.quantize(tiny_llama(), "nf4").to(BF16)
        before = {name: p.dtype for name, p in model.named_parameters()}
        lowrank.prepare_for_kbit_training(model, upcast_norms=upcast)
        after = {name: p.dtype for name, p in model.named_parameters()}
        changed = {name for name in before if before[name] != after[name]}
        norms = {name for name in before if "norm" in name}
        assert changed == (norms if upcast else set()) and len(norms) == 5


def test_what_cannot_be_prepared():
    model = lowrank.inject(tiny_llama(), LoRAConfig())
    before = state(model)
    with pytest.raises(ConfigError, match="call it before inject"):
        lowrank.prepare_for_kbit_training(model)
    assert_unchanged(model, before)
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="Sequential has no attribute.*pass False"):
        lowrank.prepare_for_kbit_training(plain)
    assert plain[0].weight.requires_grad
    lowrank.prepare_for_kbit_training(plain, use_gradient_checkpointing=False)
    assert not plain[0].weight.requires_grad
