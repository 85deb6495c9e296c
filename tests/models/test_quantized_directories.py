"""Directories that hold our own quantized layers: written, and loaded as they are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import lowrank
from lowrank import quant
from lowrank.errors import ConfigError, DtypeError, LowrankError, WeightError
from tests.models.helpers import llama, tokens
from tests.surgery.training import train

transformers = pytest.importorskip("transformers", reason="the oracle; pip install transformers")

SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    llama(attention_bias=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    llama(tie_word_embeddings=True).save_pretrained(folder)
    return folder


def assert_same_state(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


@pytest.mark.parametrize("shard", [10**9, 40_000])
@pytest.mark.parametrize("scheme", ["nf4", "codebook", "int4_affine", "int8", "nf3", "none"])
def test_a_directory_comes_back_bit_for_bit(dense, tmp_path, scheme, shard):
    quantizer = quant.CodebookQuantizer(torch.rand(16)) if scheme == "codebook" else scheme
    model = lowrank.load_model(dense, quantizer, skip=["lm_head", "layers.1.mlp.up_proj"])
    lowrank.save_model(model, tmp_path / "x", format="lowrank", max_shard_bytes=shard)
    assert (len(list((tmp_path / "x").glob("*.safetensors"))) > 1) == (shard == 40_000)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "lowrank", "version": 1}
    again, ids = lowrank.load_model(tmp_path / "x"), tokens(2, 20)
    assert_same_state(again, model)
    assert torch.equal(again(ids), model(ids))
    assert type(again.model.layers[1].mlp.up_proj) is nn.Linear
    assert again.name_or_path == str(tmp_path / "x") and not again.training


def test_its_dtypes_are_those_that_are_asked_for(dense, tmp_path):
    model = lowrank.load_model(dense, "nf4", dtype=torch.bfloat16)
    lowrank.save_model(model, tmp_path / "x", format="lowrank")
    again = lowrank.load_model(tmp_path / "x", compute_dtype=torch.bfloat16)
    layer = again.model.layers[0].self_attn.q_proj
    assert layer.compute_dtype == torch.bfloat16 and layer.bias.dtype == torch.float32
    assert again.lm_head.weight.dtype == layer.weight_dtype == torch.float32
    assert torch.equal(layer.dequantize(), model.model.layers[0].self_attn.q_proj.dequantize())
    assert_same_state(lowrank.load_model(tmp_path / "x", dtype=torch.bfloat16), model)


def test_a_tied_head_is_stored_once(tied, tmp_path):
    model, ids = lowrank.load_model(tied, "nf4"), tokens(2, 9)
    lowrank.save_model(model, tmp_path / "x", format="lowrank")
    tensors = load_file(tmp_path / "x" / SINGLE)
    assert "lm_head.weight" not in tensors
    again = lowrank.load_model(tmp_path / "x")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(ids), model(ids))
    ordinary = lowrank.load_model(tied, "int8")
    ordinary.load_state_dict(tensors)
    assert ordinary.lm_head.weight is ordinary.model.embed_tokens.weight
    assert_same_state(ordinary, model)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert_same_state(lowrank.load_quantized(empty, tmp_path / "x"), model)
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert torch.equal(empty(ids), model(ids))


def test_an_adapter_over_a_quantized_directory(dense, tmp_path):
    lowrank.save_model(lowrank.load_model(dense, "nf4"), tmp_path / "x", format="lowrank")
    model, ids = lowrank.load_model(tmp_path / "x"), tokens(2, 20)
    lowrank.inject(model, lowrank.LoRAConfig(r=4, target_modules="all-linear"))
    train(model, lambda: model.loss(ids, ids), 3, 1e-2)
    lowrank.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "x")
    again = lowrank.load_adapter(lowrank.load_model(tmp_path / "x"), tmp_path / "adapter")
    expected = model(ids)
    assert torch.equal(again(ids), expected)
    with pytest.raises(WeightError, match="expected no adapter"):
        lowrank.save_model(again, tmp_path / "y", format="lowrank")
    lowrank.save_model(lowrank.merge_and_unload(again), tmp_path / "merged")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_written_is_refused(dense, tmp_path):
    model = lowrank.load_model(dense, "nf4")
    for arguments, says in [
        (dict(format="gguf"), "format: expected one of dense, lowrank, bitsandbytes; got 'gguf'"),
        (dict(format="lowrank", dtype=torch.bfloat16), 'dtype: belongs to format="dense"'),
    ]:
        with pytest.raises(ConfigError, match=says):
            lowrank.save_model(model, tmp_path / "x", **arguments)
    for name in ("lowrank", "bitsandbytes"):
        with pytest.raises(ConfigError, match="quantized layers, and the model has none"):
            lowrank.save_model(lowrank.load_model(dense), tmp_path / "x", format=name)
    assert not (tmp_path / "x").exists()
    lowrank.save_model(model, tmp_path / "x", format="lowrank")
    with pytest.raises(ConfigError, match="expected no weights there"):
        lowrank.save_model(model, tmp_path / "x", format="lowrank")


CONFIGS = {
    "newer": (dict(quant_method="lowrank", version=2), "up to 1; got 2; it needs a newer lowrank"),
    "no version": (dict(quant_method="lowrank"), "quantization_config: expected a version"),
    "a word for version": (dict(quant_method="lowrank", version="1"), "expected a version"),
    "no method": (dict(version=1), "expected quant_method bitsandbytes or lowrank; got None"),
    "theirs": (
        dict(quant_method="bitsandbytes", load_in_4bit=True),
        r"layers\.0\..*: expected bitsandbytes 4-bit by the quantization_config; got lowrank",
    ),
    "none": (None, r"layers\.0\..*: is quantized, lowrank, which config\.json does not say"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_disagrees_is_refused(dense, tmp_path, case):
    lowrank.save_model(lowrank.load_model(dense, "nf4"), tmp_path / "x", format="lowrank")
    path = tmp_path / "x" / "config.json"
    raw = json.loads(path.read_text())
    quantization, says = CONFIGS[case]
    path.write_text(json.dumps({**raw, "quantization_config": quantization}))
    with pytest.raises(ConfigError, match=says) as caught:
        lowrank.load_model(tmp_path / "x")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_dense_weights_under_a_quantized_config_are_refused(dense, tmp_path):
    llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for given in [dict(quant_method="lowrank", version=1), dict(load_in_8bit=True)]:
        raw = json.loads(path.read_text()) | {"quantization_config": given}
        path.write_text(json.dumps(raw))
        with pytest.raises(ConfigError, match="and no tensor is quantized; take it out of config"):
            lowrank.load_model(tmp_path)


def test_another_model_of_the_family_is_refused(dense, tmp_path):
    lowrank.save_model(lowrank.load_model(dense, "nf4"), tmp_path / "x", format="lowrank")
    path = tmp_path / "x" / "config.json"
    raw = json.loads(path.read_text())
    for changes in [dict(intermediate_size=128), dict(num_hidden_layers=1), dict(vocab_size=90)]:
        path.write_text(json.dumps(raw | changes))
        with pytest.raises(LowrankError, match=r"expected|unexpected") as caught:
            lowrank.load_model(tmp_path / "x")
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    path.write_text(json.dumps(raw))
    with pytest.raises(DtypeError, match="dtype"):
        lowrank.load_model(tmp_path / "x", dtype=torch.int8)
