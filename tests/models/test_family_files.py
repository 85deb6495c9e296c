"""What families' files call otherwise, hold the other way round, or say that cannot be."""

from __future__ import annotations

import random

import pytest
import torch
from torch.testing import assert_close

import lowrank
from lowrank.errors import ConfigError, ShapeError
from lowrank.io.safetensors import load_safetensors, save_safetensors
from lowrank.models.config import DecoderConfig, rope_frequencies
from lowrank.nn.quant_weight import quant_weights
from tests.models.families import FAMILIES, make, pair
from tests.models.helpers import tokens

transformers = pytest.importorskip("transformers", reason="the oracle; pip install transformers")


def rewrite(directory, change) -> None:
    """The tensors of a directory, renamed or more."""
    path = directory / "model.safetensors"
    tensors = change(load_safetensors(path))
    path.unlink()
    save_safetensors(path, tensors)


def test_gpt2_as_it_was_published(tmp_path):
    """Its body alone, with causal masks between the weights."""
    ours, oracle = pair("gpt2", tmp_path)

    def older(tensors):
        found = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril() for i in range(3)}
        others = {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
        return {**found, **masks, **others}

    rewrite(tmp_path, older)
    again = lowrank.load_model(tmp_path)
    assert all(
        torch.equal(p, dict(ours.named_parameters())[n]) for n, p in again.named_parameters()
    )


@pytest.mark.parametrize("head", ["embed_out", "lm_head"])
def test_gpt_neox_under_both_names_of_its_head(head, tmp_path):
    _, oracle = pair("gpt_neox", tmp_path)

    def renamed(tensors):
        found = {
            n.replace("embed_out", head).replace("lm_head", head): t for n, t in tensors.items()
        }
        assert f"{head}.weight" in found
        extra = {
            f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq": torch.ones(3) for i in (0, 1)
        }
        return {**found, **extra, "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8)}

    rewrite(tmp_path, renamed)
    ids = tokens(2, 20)
    assert_close(lowrank.load_model(tmp_path)(ids), oracle(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "gemma3"])
@pytest.mark.parametrize("format", ["lowrank", "bitsandbytes"])
def test_quantized_directories_come_back(name, format, tmp_path):
    # bitsandbytes packs rows of whole blocks
    sizes = dict(n_embd=64, n_head=4) if name == "gpt2" else dict(hidden_size=64)
    if name != "gpt2":
        sizes |= dict(intermediate_size=128, head_dim=16, num_key_value_heads=4)
    make(name, **sizes).save_pretrained(tmp_path / "dense")
    skip = {"gpt2": "c_fc", "gpt_neox": "dense"}.get(name, "o_proj")
    model = lowrank.load_model(tmp_path / "dense", "nf4", skip=["lm_head", skip])
    lowrank.save_model(model, tmp_path / "packed", format=format)
    ids = tokens(2, 20)
    assert torch.equal(lowrank.load_model(tmp_path / "packed")(ids), model(ids))
    lowrank.save_model(model, tmp_path / "again", dtype=torch.float32)
    for directory in ["again", *(["packed"] if format == "bitsandbytes" else [])]:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / directory, attn_implementation="eager"
        )
        assert_close(theirs(ids).logits, model(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma2"])
def test_an_adapter_of_any_family_merges(name, tmp_path):
    model, _ = pair(name, tmp_path)
    config = lowrank.LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    lowrank.inject(model, config)
    ids = tokens(2, 20)
    expected = model(ids)
    merged = lowrank.merge_and_unload(model)
    assert_close(merged(ids), expected, atol=1e-4, rtol=1e-4)
    lowrank.save_model(merged, tmp_path / "merged")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_no_position_beyond_those_that_were_learned(tmp_path):
    model, _ = pair("gpt2", tmp_path)
    says = "at most max_position_embeddings=128 positions, as many as were learned; got 129"
    with pytest.raises(ShapeError, match=says):
        model(tokens(1, 129))
    with pytest.raises(ShapeError, match=says):
        model(tokens(1, 2), position_ids=torch.tensor([[0, 128]]))


ROPE = {"rope_theta": 1e4}


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            "qwen3",
            {"model_type": "qwen"},
            "model_type: expected one of .*qwen2.*; got 'qwen'; .*inject",
        ),
        ("qwen3", {"model_type": ["qwen3"]}, "model_type: expected one of"),
        ("mistral", {"sliding_window": 0}, "sliding_window: expected a positive integer; got 0"),
        ("mistral", {"sliding_window": "all"}, "sliding_window: expected a positive integer"),
        ("llama", {"sliding_window": 9}, "sliding_window: expected none; got 9"),
        (
            "gemma2",
            {"layer_types": ["full_attention"]},
            "layer_types: expected a list of 3, one a layer; got 1",
        ),
        ("gemma2", {"layer_types": ["odd"] * 3}, "layer_types: expected each .*; got 'odd'"),
        ("gemma2", {"layer_types": [[]] * 3}, "layer_types: expected each"),
        *(
            (
                name,
                {"layer_types": "full_attention"},
                "layer_types: expected a list of 3, one a layer; got 'full_attention'",
            )
            for name in ("gemma2", "qwen2", "qwen2-window", "llama")
        ),
        ("gemma2", {"sliding_window": None}, "sliding_window: expected a number .* layer_types"),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention: expected False",
        ),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping: expected a positive"),
        ("gemma2", {"hidden_activation": "relu6"}, "hidden_act: expected one of .*; got 'relu6'"),
        (
            "gemma3",
            {"layer_types": None, "sliding_window_pattern": "x"},
            "pattern: expected an integer",
        ),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": 3}},
            "rope_parameters: expected an object",
        ),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: expected a positive"),
        (
            "smollm3",
            {"no_rope_layers": [1]},
            "no_rope_layers: expected a list of 3, one a layer; got 1",
        ),
        ("smollm3", {"no_rope_layers": [1, 0, 2]}, "no_rope_layers: expected each 0 or 1; got 2"),
        (
            "smollm3",
            {"no_rope_layers": 7},
            "no_rope_layers: expected a list of 3, one a layer; got 7",
        ),
        (
            "qwen2-window",
            {"layer_types": None, "max_window_layers": "x"},
            "max_window_layers: expected",
        ),
        ("phi", {"qk_layernorm": True}, "qk_layernorm: expected False, .*; got True"),
        ("phi", {"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor"),
        (
            "gpt_neox",
            {"num_key_value_heads": 2},
            "num_key_value_heads: expected num_attention_heads=4",
        ),
        (
            "gpt_neox",
            {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}},
            "head_dim: rotary pairs need an even number; got head_dim=12 x 0.25",
        ),
        (
            "gpt_neox",
            {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.5}},
            "partial_rotary_factor: expected at most 1; got 1.5",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx: expected False"),
        ("gpt2", {"n_head": 0}, "n_head: expected a positive integer; got 0"),
        ("gpt2", {"n_inner": -4}, "n_inner: expected a positive integer; got -4"),
        ("phi3-longrope", {"original_max_position_embeddings": 1}, "expected more than 1; got 1"),
        (
            "phi3",
            {"rope_parameters": {**ROPE, "rope_type": "longrope", "short_factor": [1.0]}},
            "longrope needs short_factor: expected 6 positive numbers, .*; got 1 of them",
        ),
        (
            "qwen2",
            {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": "4"}},
            "yarn needs factor: expected a positive number; got '4'",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(name, change, says):
    raw = make(name).config.to_dict()
    DecoderConfig.from_hf(raw)
    with pytest.raises(ConfigError, match=says):
        DecoderConfig.from_hf({**raw, **change})


def test_a_missing_size_goes_by_its_own_word():
    raw = make("gpt2").config.to_dict()
    del raw["n_embd"], raw["n_layer"]
    with pytest.raises(
        ConfigError, match="n_embd, n_layer missing; expected those of a gpt2 model"
    ):
        DecoderConfig.from_hf(raw)


ODD = [
    None, True, False, 0, -1, 1, 7, 2**31, 10**40, 1.5, float("nan"), float("inf"), "x", [], [1],
    {}, [[1]], {"rope_type": "yarn"}, {"rope_type": "longrope", "short_factor": "abc"},
    {"full_attention": None}, {"full_attention": {"rope_type": "dynamic", "factor": 1e300}},
]  # fmt: skip
NOT_IN_ALL = [
    "rope_scaling",
    "rotary_pct",
    "n_inner",
    "sliding_window_pattern",
    "max_window_layers",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_any_value_of_any_field_is_taken_or_refused(name):
    """And what is taken survives being written."""
    raw = make(name).config.to_dict()
    for field in [*raw, *NOT_IN_ALL]:
        for value in random.sample(ODD, 6):
            try:
                config = DecoderConfig.from_hf({**raw, field: value})
            except ConfigError as error:
                assert "\n" not in str(error)
            else:
                assert DecoderConfig.from_hf(config.to_hf(torch.float32)) == config
                rope_frequencies(config, False, 10**6, "cpu")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_weights_opened_are_those_of_the_model(name, tmp_path):
    """So that an adapter starts from them over what is quantized already."""
    dense, _ = pair(name, tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()},
    )
    weights = lowrank.open_weights(tmp_path)
    for key, parameter in dense.named_parameters():
        if key in weights:  # a tied head is not
            assert torch.equal(weights[key], parameter)
            assert weights.shapes[key] == tuple(parameter.shape)
    assert {k for k, _ in dense.named_parameters()} == set(weights)
    # LoftQ: the adapter has what quantizing lost, as far as its rank goes
    quantized = lowrank.load_model(tmp_path, "nf4", skip=["lm_head"])
    plain = {f"{n}.weight": m.dequantize() for n, m in quant_weights(quantized).items()}
    config = lowrank.LoRAConfig(r=8, target_modules="all-linear", init_lora_weights="loftq")
    with pytest.raises(ConfigError, match="the original weight of .*open_weights"):
        lowrank.inject(quantized, config)
    lowrank.inject(quantized, config, weights=weights)
    nearer = dict(lowrank.merge_and_unload(quantized).named_parameters())
    assert len(plain) == 12  # of three layers
    for key, weight in plain.items():
        lost, left = ((w - weights[key]).norm() for w in (weight, nearer[key]))
        assert left < lost
