"""Loading: directories that transformers wrote, bad files, and the memory it takes."""

import json

import pytest
import torch
from torch.testing import assert_close

import lowrank
from lowrank import quant
from lowrank.errors import ConfigError, DtypeError, FileFormatError, TargetError, WeightError
from tests.models.helpers import llama, tokens

transformers = pytest.importorskip("transformers", reason="the oracle; pip install transformers")


def linears(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_a_directory_written_by_transformers_gives_its_logits(tmp_path, dtype, shard):
    llama(attention_bias=True).to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    # read back: .to(bfloat16) rounds the oracle's rotary frequencies as well
    oracle = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "50KB")
    ids = tokens(2, 30)
    model = lowrank.load_model(tmp_path)
    assert_close(model(ids), oracle(ids).logits, atol=1e-4, rtol=1e-4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.name_or_path == str(tmp_path)
    assert not model.training
    half = lowrank.load_model(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_quantizing_while_loading_equals_quantizing_after(tmp_path):
    llama(attention_bias=True, mlp_bias=True).save_pretrained(tmp_path)
    model = lowrank.load_model(tmp_path, quantizer="nf4")
    after = lowrank.quantize(lowrank.load_model(tmp_path), "nf4")
    assert linears(model, torch.nn.Linear) == {"lm_head"}
    assert linears(model, lowrank.QuantLinear) == linears(after, lowrank.QuantLinear)
    assert len(linears(model, lowrank.QuantLinear)) == 14
    expected = after.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert_close(tensor, expected[name], atol=0, rtol=0)


def test_a_half_file_is_quantized_from_its_own_precision(tmp_path):
    oracle = llama().bfloat16()
    oracle.save_pretrained(tmp_path)
    quantizer = quant.get("nf4", block_size=32, double_quant=False)
    layer = lowrank.load_model(tmp_path, quantizer=quantizer).model.layers[1].mlp.up_proj
    weight = oracle.model.layers[1].mlp.up_proj.weight.detach()
    expected = quantizer.dequantize(quantizer.quantize(weight), torch.float32)
    assert_close(layer.dequantize(), expected, atol=0, rtol=0)
    assert layer.storage.dtype == torch.float32


def test_skip_names_what_stays_dense(tmp_path):
    llama().save_pretrained(tmp_path)
    model = lowrank.load_model(tmp_path, quantizer="nf4", skip=["lm_head", "layers.0.mlp.up_proj"])
    assert linears(model, torch.nn.Linear) == {"lm_head", "model.layers.0.mlp.up_proj"}
    assert isinstance(lowrank.load_model(tmp_path, "nf4", skip=()).lm_head, lowrank.QuantLinear)
    with pytest.raises(TargetError, match="up_porj"):
        lowrank.load_model(tmp_path, quantizer="nf4", skip=["up_porj"])
    with pytest.raises(ConfigError, match="skip: expected a sequence of names"):
        lowrank.load_model(tmp_path, quantizer="nf4", skip="up_proj")


def test_a_tied_head_stays_tied_when_quantized(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    for skip in (["lm_head"], []):
        model = lowrank.load_model(tmp_path, quantizer="nf4", skip=skip)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_that_is_stored_has_to_be_the_embedding(tmp_path):
    from safetensors.torch import load_file, save_file

    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": table.clone()}, tmp_path / SINGLE)
    model = lowrank.load_model(tmp_path, "nf4")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for other in (table + 1e-3, table[1:].clone()):
        save_file({**tensors, "lm_head.weight": other}, tmp_path / SINGLE)
        with pytest.raises(FileFormatError, match="lm_head.weight: expected the embedding again"):
            lowrank.load_model(tmp_path)
    save_file(tensors, tmp_path / SINGLE)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(FileFormatError, match="missing tensors: lm_head.weight; is the head the"):
        lowrank.load_model(tmp_path)


def test_save_model_is_read_by_transformers_and_by_us(tmp_path):
    llama(rope_scaling={"rope_type": "linear", "factor": 2.0}).save_pretrained(tmp_path / "a")
    ids = tokens(2, 20)
    for quantizer, options in [(None, {}), ("nf4", {"max_shard_bytes": 50_000})]:
        model = lowrank.load_model(tmp_path / "a", quantizer=quantizer)
        saved = tmp_path / f"saved {quantizer}"
        lowrank.save_model(model, saved, **options)
        assert (len(list(saved.glob("*.safetensors"))) > 1) == bool(options)
        oracle = transformers.LlamaForCausalLM.from_pretrained(saved).eval()
        assert_close(model(ids), oracle(ids).logits, atol=1e-4, rtol=1e-4)
        assert_close(lowrank.load_model(saved)(ids), model(ids), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="expected no weights there"):
        lowrank.save_model(model, saved)
    model = lowrank.load_model(tmp_path / "a", quantizer="nf4")
    lowrank.save_model(model, tmp_path / "half", dtype=torch.bfloat16)
    half = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    lowrank.inject(model, lowrank.LoRAConfig(r=4))
    with pytest.raises(WeightError, match="expected no adapter"):
        lowrank.save_model(model, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path, n_bytes):
    path.write_bytes(path.read_bytes()[:n_bytes])


def edit_header(directory, name, **changes):
    raw = (directory / SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[name].update(changes)
    text = json.dumps(header).encode()
    (directory / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def to_integers(directory, name):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / SINGLE)
    save_file({**tensors, name: tensors[name].int()}, directory / SINGLE)


def drop(directory, name):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    tensors["stray.weight"] = tensors.pop(name)
    save_file(tensors, directory / "model.safetensors")


SINGLE = "model.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"
DAMAGES = {
    "no config": (lambda d: (d / "config.json").unlink(), FileFormatError, "config.json: no such"),
    "config not JSON": (lambda d: cut(d / "config.json", 20), FileFormatError, "not JSON"),
    "config a list": (
        lambda d: (d / "config.json").write_text("[]"),
        FileFormatError,
        "expected a JSON object; got list",
    ),
    "unknown": (lambda d: edit_config(d, model_type="t5"), ConfigError, "got 't5'.*lowrank.inject"),
    "quantized, it says": (
        lambda d: edit_config(d, quantization_config={"quant_method": "lowrank", "version": 1}),
        ConfigError,
        "quantizer: expected None for .*, which is quantized already, lowrank",
    ),
    "misshaped": (
        lambda d: edit_config(d, intermediate_size=128),
        FileFormatError,
        r"mlp.gate_proj.weight: expected shape \(128, 64\); got \(160, 64\)",
    ),
    "missing": (lambda d: drop(d, Q), FileFormatError, f"missing tensors: {Q}"),
    "unexpected": (
        lambda d: edit_config(d, num_hidden_layers=1),
        FileFormatError,
        r"unexpected tensors: (model\.layers\.1\.[a-z_.]+weight(, )?){9}$",
    ),
    "truncated": (lambda d: cut(d / SINGLE, 100_000), FileFormatError, "expected .* bytes"),
    "cut in the header": (lambda d: cut(d / SINGLE, 500), FileFormatError, "truncated"),
    "empty": (lambda d: cut(d / SINGLE, 0), FileFormatError, "truncated or not safetensors"),
    "longer": (
        lambda d: (d / SINGLE).write_bytes((d / SINGLE).read_bytes() + b"x"),
        FileFormatError,
        "expected .* bytes",
    ),
    "header garbled": (
        lambda d: (d / SINGLE).write_bytes((d / SINGLE).read_bytes().replace(b"F32", b"F33", 1)),
        FileFormatError,
        "damaged safetensors header: dtype 'F33'",
    ),
    "header nested too deeply": (
        lambda d: (d / SINGLE).write_bytes((99_999).to_bytes(8, "little") + b"[" * 99_999),
        FileFormatError,
        "damaged safetensors header",
    ),
    "header absurdly long": (
        lambda d: (d / SINGLE).write_bytes(b"\xff" * 8 + (d / SINGLE).read_bytes()[8:]),
        FileFormatError,
        "truncated or not safetensors",
    ),
    "offset no integer": (
        lambda d: edit_header(d, Q, data_offsets=[0, 4.0], shape=[1]),
        FileFormatError,
        "damaged safetensors header",
    ),
    "integers": (lambda d: to_integers(d, Q), FileFormatError, f"{Q}: expected floats; .*int32"),
    "config nested too deeply": (
        lambda d: (d / "config.json").write_text("[" * 99_999),
        FileFormatError,
        "config.json: not JSON",
    ),
    "more layers": (
        lambda d: edit_config(d, num_hidden_layers=9999),
        FileFormatError,
        "missing tensors: model.layers.9998",
    ),
    "end token": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": [[1]]}'),
        ConfigError,
        "generation_config.json: eos_token_id: expected a token id",
    ),
    "pickled": (
        lambda d: (d / SINGLE).rename(d / "pytorch_model.bin"),
        FileFormatError,
        "pickled weights run code",
    ),
    "nothing": (lambda d: (d / SINGLE).unlink(), FileFormatError, "found neither"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_directory_is_refused_in_one_line(tmp_path, damage):
    llama().save_pretrained(tmp_path)
    harm, error, says = DAMAGES[damage]
    harm(tmp_path)
    with pytest.raises(error, match=says) as caught:
        lowrank.load_model(tmp_path, quantizer="nf4")
    assert "\n" not in str(caught.value)


BAD_INDEXES = {
    "shards missing": r"names files that are not there: model-\S+, model-\S+; fetch them too",
    "shard cut": "truncated or not safetensors|expected .* bytes",
    "no map": "expected a weight_map of tensor names to files",
    "path": "expected a file name; got '../model-",
    "not there": rf"missing tensors: {Q}; model.safetensors.index.json puts them there",
}


@pytest.mark.parametrize("harm", BAD_INDEXES)
def test_a_bad_index_is_refused(tmp_path, harm):
    llama().save_pretrained(tmp_path, max_shard_size="50KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"][Q]
    if harm == "shards missing":
        (tmp_path / shard).unlink()
        (tmp_path / content["weight_map"]["model.norm.weight"]).unlink()
    elif harm == "shard cut":
        cut(tmp_path / shard, 900)
    elif harm == "no map":
        content.pop("weight_map")
    elif harm == "path":
        content["weight_map"][Q] = "../" + shard
    else:
        content["weight_map"][Q] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(FileFormatError, match=BAD_INDEXES[harm]):
        lowrank.load_model(tmp_path)


def test_a_nan_is_refused_by_name_when_quantizing(tmp_path):
    oracle = llama()
    oracle.model.layers[1].mlp.down_proj.weight.data[3, 4] = torch.nan
    oracle.save_pretrained(tmp_path)
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        lowrank.load_model(tmp_path, quantizer="nf4")


def test_open_weights_reads_one_at_a_time(tmp_path):
    oracle = llama()
    oracle.save_pretrained(tmp_path, max_shard_size="50KB")
    weights = lowrank.open_weights(tmp_path)
    expected = oracle.state_dict()
    assert set(weights) == set(expected) and len(weights) == len(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor)
    assert "lm_head.bias" not in weights
    with pytest.raises(KeyError):
        weights["lm_head.bias"]
    (tmp_path / "config.json").unlink()  # a model of any kind will do
    assert set(lowrank.open_weights(tmp_path)) == set(expected)
    with pytest.raises(ConfigError, match="no such directory"):
        lowrank.open_weights(tmp_path / "nowhere")


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    for source in (
        tmp_path / "absent",
        "no/such/path",
        "x.gguf",
        "plain",
        str(tmp_path / "x.gguf"),
    ):
        with pytest.raises(ConfigError, match="no such directory or .gguf file"):
            lowrank.load_model(source)
    with pytest.raises(ConfigError, match="pass its directory"):
        lowrank.load_model(tmp_path / "model.safetensors")
    for dtype in (torch.int8, "float32", None):
        with pytest.raises(DtypeError, match="^dtype: expected a floating-point dtype, .*; got "):
            lowrank.load_model(tmp_path, dtype=dtype)
    for quantizer in (4, quant.Fitted):
        with pytest.raises(ConfigError, match="^quantizer: expected a name or an object with"):
            lowrank.load_model(tmp_path, quantizer=quantizer)
    for skip in (None, [3]):
        with pytest.raises(ConfigError, match="^skip: expected a sequence of names; got "):
            lowrank.load_model(tmp_path, skip=skip)


def test_tensors_of_old_checkpoints_are_tolerated(tmp_path):
    from safetensors.torch import load_file, save_file

    oracle = llama(tie_word_embeddings=True)
    oracle.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / SINGLE)
    ids = tokens(1, 9)
    assert_close(lowrank.load_model(tmp_path)(ids), oracle(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_generation_config_says_what_ends_a_text(tmp_path):
    llama(eos_token_id=2).save_pretrained(tmp_path)
    assert lowrank.load_model(tmp_path).config.eos_token_ids == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert lowrank.load_model(tmp_path).config.eos_token_ids == {2, 7}
