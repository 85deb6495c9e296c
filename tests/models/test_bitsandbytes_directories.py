"""Whole directories that transformers wrote with bitsandbytes' layers, and ours that it reads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import lowrank
from lowrank import QuantLinear, quant
from lowrank.errors import ConfigError, FileFormatError, LowrankError, ShapeError
from lowrank.nn.quant_experts import QuantExperts
from tests.models.families import make
from tests.models.helpers import llama, tokens
from tests.quant.bnb_layers import bnb, dequantized, layer_tensors

transformers = pytest.importorskip("transformers", reason="the oracle; pip install transformers")

SINGLE = "model.safetensors"
UP = "model.layers.1.mlp.up_proj"
KINDS = {
    "nf4 nested": dict(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": dict(
        load_in_4bit=True, llm_int8_skip_modules=["lm_head", "model.layers.0.mlp", "v_proj"]
    ),
    "nf4 in bfloat16": dict(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage="bfloat16"
    ),
    "int8": dict(load_in_8bit=True),
    "int8 of some": dict(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "down_proj"]),
    "all of it": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=[]),
}

QUANTIZERS = {
    "nf4": quant.get("nf4", block_size=32),
    "nf4 without double quantization": quant.get("nf4", double_quant=False),
    "fp4": quant.get("fp4"),
    "flat": quant.get("flat"),
    "int8": quant.get("int8"),
}


def from_pretrained(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, device_map="cpu", **options
    ).eval()


def write(folder, kind, dtype=torch.float32, shard="5GB", **changes):
    """A random Llama, quantized by transformers and bitsandbytes on the CPU, and saved.

    Blocks of 64 end with the rows in all layers but down_proj, where K is 160.
    """
    llama(attention_bias=True, **changes).save_pretrained(folder / "dense")
    config = transformers.BitsAndBytesConfig(**KINDS[kind])
    theirs = from_pretrained(folder / "dense", quantization_config=config, dtype=dtype)
    theirs.save_pretrained(folder / "quantized", max_shard_size=shard)
    return folder / "quantized", theirs


def theirs_dense(model):
    """{name: the weight that bitsandbytes computes with}."""
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            tensors = layer.state_dict() | {"weight": layer.weight.data}
            weights[name] = dequantized({n: t for n, t in tensors.items() if n != "bias"})
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            weights[name] = bnb.functional.int8_vectorwise_dequant(
                layer.weight.data, layer.weight.SCB
            )
    return weights


def their_logits(theirs, ids):
    """Those of transformers with the weights dense: bitsandbytes' own product is of 16 bits."""
    raw = theirs.config.to_dict()
    del raw["quantization_config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).eval()
    state, weights = theirs.state_dict(), theirs_dense(theirs)
    taken = {name: tensor for name, tensor in state.items() if name in model.state_dict()}
    taken |= {f"{name}.weight": weight for name, weight in weights.items()}
    model.load_state_dict(taken)
    return model(ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_of_transformers_gives_its_very_weights(tmp_path, kind, dtype):
    shard = "5GB" if dtype == torch.float32 else "60KB"
    directory, theirs = write(tmp_path, kind, dtype, shard)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == (dtype == torch.bfloat16)
    weights = theirs_dense(theirs)
    ours = lowrank.load_model(directory, dtype=dtype)
    held = {name: m for name, m in ours.named_modules() if isinstance(m, QuantLinear)}
    assert held.keys() == weights.keys()
    assert len(held) == {"fp4": 9, "all of it": 15, "int8 of some": 12}.get(kind, 14)
    for name, weight in weights.items():
        assert torch.equal(held[name].dequantize(weight.dtype), weight), name
    ids = tokens(2, 20)
    if dtype == torch.float32:
        assert_close(ours(ids), their_logits(theirs, ids), atol=1e-4, rtol=1e-4)


def test_a_tied_head_and_sixteen_bit_compute(tmp_path):
    directory, theirs = write(tmp_path, "nf4 nested", tie_word_embeddings=True)
    assert lowrank.load_model(directory).model.layers[0].mlp.up_proj.compute_dtype is None
    edit_quantization(directory, bnb_4bit_compute_dtype="bfloat16")
    ours = lowrank.load_model(directory)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    ids = tokens(1, 20)
    difference = (ours(ids) - their_logits(theirs, ids)).abs().max()
    assert 0 < difference < 0.1 * their_logits(theirs, ids).abs().max()
    exact = lowrank.load_model(directory, compute_dtype=torch.float32)
    assert_close(exact(ids), their_logits(theirs, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shard", [10**9, 60_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_what_we_write_transformers_loads_with_the_same_weights(tmp_path, quantizer, dtype, shard):
    llama(attention_bias=True, intermediate_size=192).save_pretrained(tmp_path / "dense")
    skip = ["lm_head", "layers.1.mlp.down_proj"]
    ours = lowrank.load_model(tmp_path / "dense", QUANTIZERS[quantizer], dtype=dtype, skip=skip)
    lowrank.save_model(ours, tmp_path / "out", format="bitsandbytes", max_shard_bytes=shard)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard == 60_000)
    theirs = from_pretrained(tmp_path / "out")
    assert theirs.dtype == dtype
    weights = theirs_dense(theirs)
    assert len(weights) == 13
    for name, weight in weights.items():
        assert torch.equal(ours.get_submodule(name).dequantize(weight.dtype), weight)
    ids = tokens(2, 20)
    if dtype == torch.float32:
        assert_close(ours(ids), their_logits(theirs, ids), atol=1e-4, rtol=1e-4)
    again = lowrank.load_model(tmp_path / "out", dtype=dtype)
    state = theirs.state_dict()
    for name, parameter in again.named_parameters():  # biases, norms, the embedding
        if parameter.is_floating_point():
            assert torch.equal(state[name], parameter)
    for name in weights:
        assert torch.equal(
            again.get_submodule(name).dequantize(), ours.get_submodule(name).dequantize()
        )


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_directory_that_was_read_is_written_back_unchanged(tmp_path, kind):
    directory, _ = write(tmp_path, kind)
    lowrank.save_model(lowrank.load_model(directory), tmp_path / "back", format="bitsandbytes")
    before, after = (load_file(d / SINGLE) for d in (directory, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name])


def test_schemes_that_bitsandbytes_lacks_are_not_written(tmp_path):
    llama(intermediate_size=192).save_pretrained(tmp_path / "dense")
    model = lowrank.load_model(tmp_path / "dense", quantizer="int4")
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj: .*lowrank.* any scheme"):
        lowrank.save_model(model, tmp_path / "out", format="bitsandbytes")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["nf4 nested", "nf4 in bfloat16"])
def test_whatever_was_read_can_be_written_for_transformers(tmp_path, kind):
    """Nested scales and bytes in bfloat16 stay in the layers that are flat, and go elsewhere."""
    directory, theirs = write(tmp_path, kind)
    lowrank.save_model(lowrank.load_model(directory), tmp_path / "back", format="bitsandbytes")
    expected, again = theirs_dense(theirs), theirs_dense(from_pretrained(tmp_path / "back"))
    assert expected.keys() == again.keys()
    assert all(torch.equal(again[name], weight) for name, weight in expected.items())


def edit_config(directory, change):
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def edit_quantization(directory, **changes):
    edit_config(directory, lambda raw: raw["quantization_config"].update(changes))


def edit_tensors(directory, change):
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


def replace_layer(directory, **own):
    def change(tensors):
        for name in [name for name in tensors if name.startswith(f"{UP}.")]:
            del tensors[name]
        tensors.update({f"{UP}.{name}": tensor for name, tensor in own.items()})

    edit_tensors(directory, change)


DAMAGES = {
    "another method": (
        lambda d: edit_quantization(d, quant_method="gptq"),
        ConfigError,
        "got 'gptq'; load the model it was made from, with quantizer=",
    ),
    "no object": (
        lambda d: edit_config(d, lambda raw: raw.update(quantization_config="awq")),
        ConfigError,
        "quantization_config: expected an object; got 'awq'",
    ),
    "no bits": (
        lambda d: edit_quantization(d, load_in_4bit=False),
        ConfigError,
        "expected load_in_4bit or load_in_8bit; got neither",
    ),
    "both bits": (
        lambda d: edit_quantization(d, load_in_8bit=True),
        ConfigError,
        "expected load_in_4bit or load_in_8bit; got both",
    ),
    "eight for four": (
        lambda d: edit_quantization(d, load_in_8bit=True, load_in_4bit=False),
        ConfigError,
        r"layers\.0\..*: expected bitsandbytes 8-bit by the quantization_config; got .* 4-bit",
    ),
    "ours, it says": (
        lambda d: edit_quantization(d, quant_method="lowrank", version=1),
        ConfigError,
        "expected lowrank by the quantization_config; got bitsandbytes 4-bit",
    ),
    "not quantized, it says": (
        lambda d: edit_config(d, lambda raw: raw.pop("quantization_config")),
        ConfigError,
        r"layers\.0\..*: is quantized, bitsandbytes 4-bit, which config\.json does not say",
    ),
    "skipped, it says": (
        lambda d: edit_quantization(d, llm_int8_skip_modules=["lm_head", "up_proj"]),
        ConfigError,
        r"layers\.0\.mlp\.up_proj: is quantized, which llm_int8_skip_modules=.* correct that list",
    ),
    "dense where none is skipped": (
        lambda d: replace_layer(d, weight=torch.randn(160, 64)),
        ConfigError,
        rf"{UP}: is dense, which llm_int8_skip_modules=\['lm_head'\]",
    ),
    "skip no list": (
        lambda d: edit_quantization(d, llm_int8_skip_modules="lm_head"),
        ConfigError,
        "llm_int8_skip_modules: expected a list of names; got 'lm_head'",
    ),
    "skip no pattern": (
        lambda d: edit_quantization(d, llm_int8_skip_modules=["*"]),
        ConfigError,
        r"llm_int8_skip_modules: expected names; got '\*'",
    ),
    "no state": (
        lambda d: edit_tensors(d, lambda t: t.pop(f"{UP}.weight.quant_state.bitsandbytes__nf4")),
        FileFormatError,
        rf"{UP}\.weight: expected .*quant_state",
    ),
    "cut scales": (
        lambda d: edit_tensors(
            d, lambda t: t.update({f"{UP}.weight.absmax": t[f"{UP}.weight.absmax"][1:]})
        ),
        FileFormatError,
        rf"{UP}\.weight\.absmax: expected shape \[160\]; got float32 \[159\]",
    ),
    "another layer's tensors": (
        lambda d: edit_tensors(
            d,
            lambda t: t.update(
                {
                    name: t[name.replace("up_proj", "down_proj")].clone()
                    for name in t
                    if name.startswith(f"{UP}.")
                }
            ),
        ),
        LowrankError,
        rf"{UP}\.weight: expected a weight of \[160, 64\]; got \[64, 160\]",
    ),
    "no bias": (
        lambda d: edit_tensors(d, lambda t: t.pop("model.layers.0.self_attn.q_proj.bias")),
        FileFormatError,
        r"missing tensors: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "a layer too many": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.other.weight.absmax": torch.ones(1)})),
        FileFormatError,
        "unexpected tensors: model.other.weight.absmax",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bitsandbytes"), "nf4")[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_directory_is_refused_in_one_line(good, tmp_path, damage):
    directory = tmp_path / "bad"
    directory.mkdir()
    for path in good.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    lowrank.load_model(directory)
    harm, error, says = DAMAGES[damage]
    harm(directory)
    with pytest.raises(error, match=says) as caught:
        lowrank.load_model(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


def test_a_quantizer_beside_a_quantized_directory_is_refused(good):
    with pytest.raises(ConfigError, match="quantizer: expected None for .*bitsandbytes 4-bit"):
        lowrank.load_model(good, quantizer="nf4")


def quantized_by_layer(directory, kind, nested) -> dict:
    """The model of a directory as transformers 4 wrote it: experts and routers are linear layers,
    each quantized by bitsandbytes. Returns the weights that these stand for.
    """
    tensors, found, dense = load_file(directory / SINGLE), {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or "embed_tokens" in name or "lm_head" in name:
            found[name] = dense[name] = tensor
            continue
        made, weight = layer_tensors(tensor, kind, nested)
        found |= {name.removesuffix("weight") + key: value for key, value in made.items()}
        dense[name] = weight
    save_file(found, directory / SINGLE)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return dense


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("nested", [False, True])
def test_experts_that_are_layers_of_bitsandbytes(name, nested, tmp_path):
    sizes = dict(hidden_size=64, num_key_value_heads=4, head_dim=16)
    sizes |= dict(num_local_experts=5) if name == "mixtral" else dict(num_experts=5)
    width = "intermediate_size" if name == "mixtral" else "moe_intermediate_size"
    oracle = make(name, **sizes, **{width: 128}, num_experts_per_tok=2)
    directory = tmp_path / name
    oracle.save_pretrained(directory)
    dense = quantized_by_layer(directory, "nf4", nested)
    model = lowrank.load_model(directory)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts.gate_up_proj, QuantExperts)
    assert isinstance(experts.down_proj, QuantExperts)
    (tmp_path / "dense").mkdir()
    save_file(dense, tmp_path / "dense" / SINGLE)
    oracle.config.save_pretrained(tmp_path / "dense")
    ids = tokens(2, 20)
    theirs = from_pretrained(tmp_path / "dense", attn_implementation="eager")
    assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    planned = lowrank.plan_memory(directory, lowrank.LoRAConfig(r=2), max_length=16)
    held = sum(p.nbytes for p in model.parameters())
    kinds = ("packed weights", "scales", "dense weights", "embeddings")
    assert sum(planned.components[kind] for kind in kinds) == held

    packed = load_file(directory / SINGLE)
    part = next(n for n in packed if "experts.3" in n and n.endswith("weight"))
    for key in [key for key in packed if key.startswith(part)]:
        del packed[key]
    save_file({**packed, part: dense[part]}, directory / SINGLE)
    with pytest.raises(FileFormatError, match=r"expected all of its tensors quantized, or none"):
        lowrank.load_model(directory)
    save_file(packed, directory / SINGLE)
    with pytest.raises(FileFormatError, match=r"missing|expected all of its tensors quantized"):
        lowrank.load_model(directory)
    wrong, _ = layer_tensors(torch.randn(64, 64), "nf4", nested)
    start = part.removesuffix("weight")
    save_file({**packed, **{start + k: v for k, v in wrong.items()}}, directory / SINGLE)
    with pytest.raises(ShapeError, match=r"experts\.3\..*: expected a weight of \["):
        lowrank.load_model(directory)
