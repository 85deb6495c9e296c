"""Targets, ranks, counts and refusals of inject, against PEFT on a tiny Llama."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LoRAConfig, LoRALinear
from lowrank.errors import ConfigError, LowrankError, TargetError
from tests.adapters.oracle import peft_model, tiny_llama
from tests.surgery.models import assert_unchanged, names_of, refused, state, two_adapters


def peft_names(model: nn.Module) -> set[str]:
    from peft.tuners.lora import LoraLayer

    return {
        name
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer)
    }


TARGETS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": r".*layers\.1\..*(gate|up)_proj"},
    {"target_modules": ["model.layers.0.self_attn.k_proj", "mlp.down_proj"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": None},
    {"target_modules": ["q_proj"], "bias": "all"},
    {"target_modules": ["q_proj"], "bias": "lora_only"},
    {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 3, r"layers\.1\..*": 5},
        "alpha_pattern": {"up_proj": 2.5},
    },
]


@pytest.mark.parametrize("options", TARGETS)
def test_targets_ranks_scalings_and_the_line_are_pefts(options, capsys):
    model = tiny_llama(attention_bias=True)
    theirs = peft_model(model, r=4, lora_alpha=6, **options)
    assert lowrank.inject(model, LoRAConfig(r=4, lora_alpha=6, **options)) is model
    assert names_of(model, LoRALinear) == peft_names(theirs)
    for name in names_of(model, LoRALinear):
        ours, other = model.get_submodule(name), theirs.base_model.model.get_submodule(name)
        assert (ours.r, ours.lora_alpha, ours.scaling) == (other.r, other.lora_alpha, other.scaling)
    wanted = {
        n.removeprefix("base_model.model."): p.requires_grad for n, p in theirs.named_parameters()
    }
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    theirs.print_trainable_parameters()
    line = capsys.readouterr().out
    lowrank.print_trainable_parameters(model)
    assert capsys.readouterr().out == line
    assert lowrank.count_parameters(model) == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize(
    ("targets", "nearest"),
    [
        (["q_prj"], "q_proj"),
        (["q_proj", "gate"], "gate_proj"),
        (["query_key_value"], "down_proj"),
        (r"q_proj", "q_proj"),
        (r".*\.nothing", "o_proj"),
        (["layers.7.q_proj"], "q_proj"),
    ],
)
def test_targets_that_match_nothing(targets, nearest):
    model = tiny_llama()
    with refused(model, TargetError, nearest):
        lowrank.inject(model, LoRAConfig(target_modules=targets))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"exclude_modules": ["o_prjo"]}, "exclude_modules: 'o_prjo' .* nearest: o_proj"),
        ({"exclude_modules": ".*"}, "exclude_modules='.*' leaves nothing of what target_modules="),
        ({"layers_to_transform": 7}, "layers_to_transform=7: target_modules=.* in no such layer"),
        ({"rank_pattern": {"q_proj": 2, "k_proj": 3}}, "rank_pattern: 'k_proj' matches none"),
        ({"alpha_pattern": {"q_prj": 2}}, "alpha_pattern: 'q_prj' matches none of the 2 targets"),
    ],
)
def test_settings_of_layers_that_match_nothing(changes, says):
    model = tiny_llama()
    with refused(model, TargetError, says):
        lowrank.inject(model, LoRAConfig(target_modules=["q_proj"], **changes))


def test_a_layers_pattern_may_have_groups():
    config = LoRAConfig(
        target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="(h|layers)"
    )
    model = lowrank.inject(tiny_llama(), config)
    assert names_of(model, LoRALinear) == {"model.layers.1.self_attn.q_proj"}


def test_the_first_adapter_after_the_last_was_deleted_is_active():
    model = lowrank.inject(tiny_llama(), LoRAConfig(target_modules=["q_proj"]))
    lowrank.delete_adapter(model, "default")
    lowrank.inject(model, LoRAConfig(target_modules=["q_proj"], r=2), adapter="b")
    assert model.model.layers[0].self_attn.q_proj.active_adapters == ["b"]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all(".b.weight" in name for name in trained)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_the_biases_of_an_idle_adapter_do_not_train(bias):
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    lowrank.inject(model, LoRAConfig(target_modules=["q"], bias=bias), adapter="a")
    lowrank.inject(model, LoRAConfig(target_modules=["k"]), adapter="b")

    def trained():
        return {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}

    before = trained()
    assert len(before) == {"lora_only": 1, "all": 3}[bias]
    lowrank.set_adapter(model, "b")
    assert not trained()
    lowrank.set_adapter(model, ["b", "a"])
    assert trained() == before


def test_targets_that_are_no_linears():
    model = tiny_llama()
    before = state(model)
    for targets in (["mlp"], ["q_proj", "norm"], r".*norm"):
        with pytest.raises(TargetError, match="expected a layer that can have adapters"):
            lowrank.inject(model, LoRAConfig(target_modules=targets))
    with pytest.raises(TargetError, match="matches nothing"):
        lowrank.inject(nn.Sequential(nn.ReLU()), LoRAConfig(target_modules="all-linear"))
    assert_unchanged(model, before)


def test_an_error_half_way_leaves_the_model_alone(monkeypatch):
    model = tiny_llama()
    lowrank.inject(model, LoRAConfig(target_modules=["q_proj"], bias="all"))
    before = state(model)
    calls = []

    def fails(weight, *_, **__):
        calls.append(weight)
        if len(calls) == 3:
            raise MemoryError

    monkeypatch.setattr(torch.Tensor, "uniform_", fails)
    with pytest.raises(MemoryError):
        lowrank.inject(model, LoRAConfig(target_modules=["q_proj", "k_proj"]), adapter="b")
    assert_unchanged(model, before)


def test_the_config_is_not_changed_and_all_linear_is_resolved():
    config = LoRAConfig(target_modules="all-linear")
    model = lowrank.inject(tiny_llama(), config)
    assert config == LoRAConfig(target_modules="all-linear")
    assert len(model.model.layers[0].mlp.up_proj.config["default"].target_modules) == 14
    model = lowrank.inject(tiny_llama(layers=3), config)  # 21 names: as PEFT, down to suffixes
    theirs = peft_model(tiny_llama(layers=3), target_modules="all-linear")
    resolved = model.model.layers[0].mlp.up_proj.config["default"].target_modules
    assert set(resolved) == theirs.peft_config["default"].target_modules


def test_a_layer_in_two_places_is_adapted_once():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    lowrank.inject(model, LoRAConfig(target_modules="all-linear"))
    assert model["a"][0] is model["b"][0] and isinstance(model["a"][0], LoRALinear)
    lowrank.merge_and_unload(model)
    assert model["a"][0] is model["b"][0] and type(model["a"][0]) is nn.Linear


@pytest.mark.parametrize(
    "act",
    [
        lambda m: lowrank.set_adapter(m, "c"),
        lambda m: lowrank.set_adapter(m, ["a", "c"]),
        lambda m: lowrank.delete_adapter(m, "c"),
        lambda m: lowrank.scale_adapter(m, "c", 2.0),
        lambda m: lowrank.merge(m, ["c"]),
        lambda m: lowrank.inject(m, {"r": 4, "target_modules": ["o_proj"]}, adapter="d"),
        lambda m: lowrank.inject(m, LoRAConfig(target_modules=["o_proj"]), adapter=5),
        lambda m: lowrank.merge(m, dtype=torch.int8),
        lambda m: lowrank.inject(m, LoRAConfig(target_modules=["o_proj"]), adapter="a"),
        lambda m: lowrank.inject(m, LoRAConfig(target_modules=["o_proj"]), adapter="x.y"),
        lambda m: lowrank.inject(m, LoRAConfig(target_modules=["o_proj"], bias="all"), adapter="d"),
    ],
)
def test_wrong_requests_change_nothing(act):
    model = two_adapters(bias="lora_only")
    with refused(model, LowrankError):
        act(model)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: lowrank.inject(m, LoRAConfig()),
        lambda m: lowrank.quantize(m),
        lambda m: lowrank.set_adapter(m, "a"),
        lambda m: lowrank.delete_adapter(m, "a"),
        lambda m: lowrank.scale_adapter(m, "a", 2.0),
        lambda m: lowrank.combine_adapters(m, ["a"], [1.0], into="b"),
        lambda m: lowrank.adapter_rows(m, ["a"]).__enter__(),
        lambda m: lowrank.extract_adapter(m, {}, LoRAConfig()),
        lambda m: lowrank.save_adapter(m, "nowhere"),
        lambda m: lowrank.save_quantized(m, "nowhere"),
        lambda m: lowrank.load_quantized(m, "nowhere"),
        lambda m: lowrank.save_model(m, "nowhere"),
        lowrank.count_parameters,
        lowrank.print_trainable_parameters,
        lowrank.disable_adapters,
        lowrank.enable_adapters,
        lowrank.merge,
        lowrank.unmerge,
        lowrank.unload,
        lowrank.merge_and_unload,
        lowrank.merge_quantized,
    ],
)
@pytest.mark.parametrize("model", [None, 3, "SmolLM2"])
def test_what_is_no_model_is_refused(call, model):
    with pytest.raises(ConfigError, match="model: expected an nn.Module; got .*load_model reads"):
        call(model)


def test_inference_mode_freezes():
    model = lowrank.inject(
        tiny_llama(), LoRAConfig(target_modules=["q_proj"], bias="all", inference_mode=True)
    )
    assert not any(p.requires_grad for p in model.parameters())


def test_injecting_again_leaves_what_trains():
    model = lowrank.inject(tiny_llama(), LoRAConfig(target_modules=["q_proj"]))
    model.model.embed_tokens.weight.requires_grad_(True)
    lowrank.inject(model, LoRAConfig(target_modules=["q_proj", "k_proj"]), adapter="b")
    assert model.model.embed_tokens.weight.requires_grad
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".b." in n)
