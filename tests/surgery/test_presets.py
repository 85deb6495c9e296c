"""Layers that are adapted when nobody names them, and by strategy, on models of each family."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from torch import nn

import lowrank
from lowrank import LoRAConfig
from lowrank.errors import TargetError
from lowrank.nn.adapted import AdaptedLayer
from tests.adapters.oracle import tiny_llama, transformers
from tests.surgery.models import names_of

SIZES = {
    "vocab_size": 48, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1,
    "intermediate_size": 40, "num_key_value_heads": 1, "n_embd": 24, "n_head": 2, "n_layer": 1,
    "d_model": 24, "d_kv": 12, "d_ff": 40, "num_heads": 2, "num_layers": 1, "n_layers": 1,
    "n_heads": 2, "pad_token_id": 0, "rotary_dim": 8, "ffn_dim": 40, "word_embed_proj_dim": 24,
    "num_local_experts": 2, "num_decoder_layers": 1, "rope_scaling": None, "hidden_dim": 40,
    "dim": 24,
}  # fmt: skip

FAMILIES = [
    "Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Gemma2", "StableLm", "Phi", "GPT2",
    "GPTBigCode", "GPTNeoX", "GPTJ", "CodeGen", "Bloom", "Falcon", "Mpt", "OPT", "T5", "Bert",
    "Electra", "Roberta",
]  # fmt: skip
NOT_PEFTS = {"Phi3": ["qkv_proj"], "DistilBert": ["q_lin", "v_lin"], "Cohere": ["q_proj", "v_proj"]}
ATTENTION = {
    "Llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "GPT2": {"c_attn", "c_proj"},
    "GPTNeoX": {"query_key_value", "dense"},
    "T5": {"q", "k", "v", "o"},
    "Bert": {"query", "key", "value", "dense"},
    "Phi": {"q_proj", "k_proj", "v_proj", "dense"},
    "Mpt": {"Wqkv", "out_proj"},
}


def model_of(family: str) -> nn.Module:
    config = getattr(transformers, f"{family}Config")
    known = set(vars(config())) | set(config.attribute_map)
    made = config(**{name: value for name, value in SIZES.items() if name in known})
    return getattr(transformers, f"{family}Model")(made)


def adapted_names(family: str, targets) -> tuple[set[str], list[str]]:
    model = lowrank.inject(model_of(family), LoRAConfig(r=2, target_modules=targets))
    names = names_of(model, AdaptedLayer)
    return names, model.get_submodule(min(names)).config["default"].target_modules


@pytest.mark.parametrize("family", FAMILIES)
def test_what_none_means_is_pefts_choice(family):
    constants = pytest.importorskip("peft.utils.constants", reason="needs peft: pip install peft")
    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    model = model_of(family)
    wanted = table[model.config.model_type]
    ends = {n for n, _ in model.named_modules() if n.split(".")[-1] in wanted}
    names, saved = adapted_names(family, None)
    assert names == ends and set(saved) == {name.split(".")[-1] for name in ends}


@pytest.mark.parametrize("family", NOT_PEFTS)
def test_what_none_means_elsewhere(family):
    names, saved = adapted_names(family, None)
    assert sorted(saved) == NOT_PEFTS[family]
    assert {name.split(".")[-1] for name in names} == set(NOT_PEFTS[family])


def test_the_first_qwen_is_adapted_as_tutorials_do():
    """Its own code is no part of transformers."""
    attention = nn.ModuleDict({"c_attn": nn.Linear(8, 24), "c_proj": nn.Linear(8, 8)})
    mlp = nn.ModuleDict({n: nn.Linear(8, 8) for n in ("w1", "w2", "c_proj")})
    model = nn.ModuleDict({"attn": attention, "mlp": mlp})
    model.config = SimpleNamespace(model_type="qwen")
    lowrank.inject(model, LoRAConfig(r=2))
    assert names_of(model, AdaptedLayer) == {"attn.c_attn", "attn.c_proj", "mlp.c_proj"}


@pytest.mark.parametrize("family", ATTENTION)
def test_attention(family):
    names, _ = adapted_names(family, "attention")
    assert {name.split(".")[-1] for name in names} == ATTENTION[family]
    assert all("attn" in name.lower() or "attention" in name.lower() for name in names)
    within = {n for n, m in model_of(family).named_modules() if n in names}
    assert within == names


def test_strategies_in_some_layers_and_their_files(tmp_path):
    config = LoRAConfig(target_modules="Minimal", layers_to_transform=[1])
    model = lowrank.inject(tiny_llama(), config)
    expected = {f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qv"}
    assert names_of(model, AdaptedLayer) == expected
    lowrank.save_adapter(model, tmp_path)
    again = lowrank.load_adapter(tiny_llama(), tmp_path)
    assert names_of(again, AdaptedLayer) == expected


def test_a_regex_that_is_called_as_a_strategy():
    def model() -> nn.Module:
        return nn.ModuleDict(
            {"minimal": nn.Linear(4, 4), "other": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})}
        )

    for targets in ("(minimal)", ["minimal"]):
        here = lowrank.inject(model(), LoRAConfig(r=2, target_modules=targets))
        assert names_of(here, AdaptedLayer) == {"minimal"}
    # in PEFT's files it can be nothing else
    content = {"peft_type": "LORA", "r": 2, "target_modules": "minimal"}
    here = lowrank.inject(model(), LoRAConfig.from_peft(content))
    assert names_of(here, AdaptedLayer) == {"minimal"}
    here = lowrank.inject(model(), LoRAConfig(r=2, target_modules="minimal"))
    assert names_of(here, AdaptedLayer) == {"other.q_proj"}


@pytest.mark.parametrize("strategy", [None, "minimal", "attention"])
def test_a_strategy_that_finds_nothing(strategy):
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match="matches nothing.*linear layers are down, up"):
        lowrank.inject(model, LoRAConfig(target_modules=strategy))


def test_a_rank_beyond_the_weights_is_said(caplog):
    with caplog.at_level(logging.WARNING, "lowrank"):
        lowrank.inject(tiny_llama(), LoRAConfig(r=12, target_modules=["q_proj", "v_proj"]))
        assert not caplog.records
        lowrank.inject(
            tiny_llama(),
            LoRAConfig(r=12, rank_pattern={"v_proj": 13}, target_modules=["q_proj", "v_proj"]),
        )
    assert "layers.0.self_attn.v_proj (r=13 of at most 12) and 1 more" in caplog.text
