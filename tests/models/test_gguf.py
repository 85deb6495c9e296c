"""GGUF files made by the gguf package's own writer, whole and broken."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import lowrank
from lowrank.errors import ConfigError, FileFormatError
from lowrank.models.gguf_file import GGUFFile
from lowrank.nn.quant_experts import QuantExperts
from tests.models.families import make
from tests.models.gguf_models import write_gguf
from tests.models.helpers import llama, tokens

gguf = pytest.importorskip("gguf", reason="the writer and oracle; pip install gguf")
transformers = pytest.importorskip("transformers", reason="the oracle; pip install transformers")


def dequantized(model, kind):
    """The model with each weight as the gguf package reads it back."""
    quant = gguf.GGMLQuantizationType[kind]
    for parameter in {id(p): p for p in model.parameters()}.values():
        if parameter.ndim == 2 and kind != "F32":
            codes = gguf.quants.quantize(parameter.detach().numpy(), quant)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(codes, quant).copy())
    return model


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.mark.parametrize(("kind", "tied"), [(kind, i % 2 > 0) for i, kind in enumerate(KINDS)])
def test_logits_equal_transformers_on_the_same_values(tmp_path, kind, tied):
    oracle = llama(tie_word_embeddings=tied, rope_theta=50000.0, rms_norm_eps=1e-5)
    write_gguf(tmp_path / "m.gguf", oracle, kind)
    model = lowrank.load_model(tmp_path / "m.gguf")
    ids = tokens(2, 40)
    with torch.no_grad():
        expected = dequantized(oracle, kind)(ids).logits
        assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
    assert model.config.rms_norm_eps == 1e-5
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.5, 2.0, 3.0, 3.5],
    "long_factor": [1.5, 2.0, 4.0, 6.0, 9.0, 9.5],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# what transformers' config says of a tiny model; windows and biases as GGUF can have them
ARCHITECTURES = {
    "llama": {},
    "llama-3": {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    "mistral": {"sliding_window": None, "head_dim": 10},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2-yarn": {"rope_parameters": {"rope_theta": 1e6, **YARN}},
    "qwen3": {"head_dim": 16},
    "smollm3": {"num_hidden_layers": 5},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
    },
    "phi": {"num_key_value_heads": 4},
    "gemma2": {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 16,
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 7,
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_neox-one": {"rotary_pct": 0.5, "use_parallel_residual": False},
    "gpt2": {"num_key_value_heads": 4},
    "phi3": {"sliding_window": 16},
    "phi3-longrope": {
        "rope_scaling": LONG_ROPE,
        "original_max_position_embeddings": 32,
        "sliding_window": None,
    },
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_the_logits_of_what_it_was_made_from(tmp_path, name):
    oracle = make(name, **ARCHITECTURES[name])
    write_gguf(tmp_path / "m.gguf", oracle)
    model = lowrank.load_model(tmp_path / "m.gguf")
    ids = tokens(2, 50)
    with torch.no_grad():
        assert_close(model(ids), oracle(ids).logits, atol=1e-4, rtol=1e-4)
    scaled = {"llama-3": "longrope", "qwen2-yarn": "yarn", "phi3-longrope": "longrope"}.get(name)
    assert (model.config.rope_scaling or {}).get("rope_type") == scaled
    # and what is saved of it is a model of that family
    lowrank.save_model(model, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert_close(again(ids).logits, oracle(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Q4_0", "BF16"])
def test_experts_are_those_of_the_file_in_any_type(tmp_path, kind):
    oracle = make("qwen3_moe", hidden_size=64, moe_intermediate_size=32, mlp_only_layers=[])
    write_gguf(tmp_path / "m.gguf", oracle, kind)
    dense = lowrank.load_model(tmp_path / "m.gguf", dtype=torch.float64)
    quant = gguf.GGMLQuantizationType[kind]
    packed = lowrank.load_model(tmp_path / "m.gguf", "nf4")
    for name, weight in oracle.named_parameters():
        if weight.ndim == 3:
            codes = gguf.quants.quantize(weight.detach().numpy(), quant)
            expected = torch.from_numpy(gguf.quants.dequantize(codes, quant).copy())
            assert torch.equal(dense.get_parameter(name), expected.double())
            whole = QuantExperts(expected, "nf4")
            assert torch.equal(packed.get_submodule(name).dequantize(), whole.dequantize())


def readable_types():
    """Every type of matrices that the gguf package can decode."""
    names = []
    for kind in gguf.GGMLQuantizationType:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        names.append(kind.name)
    return names


def write_codes(path, kind, rows, n_blocks, architecture="llama"):
    """A file with one matrix of random codes; returns them, [rows, bytes]."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    codes = torch.randint(0, 256, (rows, n_blocks * size), dtype=torch.uint8).numpy()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor("token_embd.weight", codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return codes


@pytest.mark.parametrize("kind", readable_types())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random codes have infinite scales
def test_every_type_is_read_in_pieces_as_the_gguf_package_decodes_it_whole(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    n_blocks = max(1, 1030 // block)
    rows = 2 * 2**18 // (n_blocks * size) + 7  # the third piece is short
    codes = write_codes(tmp_path / "m.gguf", kind, rows, n_blocks)
    ours = GGUFFile(tmp_path / "m.gguf").read("token_embd.weight")
    expected = gguf.quants.dequantize(codes, kind)
    assert ours.shape == (rows, n_blocks * block)
    assert_close(ours, torch.tensor(expected), atol=0, rtol=0, equal_nan=True)


def test_the_types_that_are_read():
    kinds = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"}
    assert kinds | {f"Q{n}_K" for n in range(2, 7)} <= set(readable_types())


def test_a_type_that_cannot_be_decoded_is_named(tmp_path):
    write_codes(tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q8_1, 4, 3)
    with pytest.raises(FileFormatError, match=r"token_embd\.weight: .* cannot decode Q8_1"):
        GGUFFile(tmp_path / "m.gguf").read("token_embd.weight")


def test_linear_positions_and_quantization(tmp_path):
    oracle = llama(rope_scaling={"rope_type": "linear", "factor": 4.0})
    write_gguf(tmp_path / "m.gguf", oracle)
    ids = tokens(1, 60)
    model = lowrank.load_model(str(tmp_path / "m.gguf"))
    assert_close(model(ids), oracle(ids).logits, atol=1e-4, rtol=1e-4)
    ours = lowrank.load_model(tmp_path / "m.gguf", quantizer="nf4")
    assert_close(ours(ids), lowrank.quantize(model, "nf4")(ids), atol=1e-5, rtol=1e-5)


def test_the_header_is_read_as_the_gguf_package_reads_it(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, llama(), "Q4_0", tokenizer_model="gpt2", token_list=["a", "é", "ģ"])
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    fields = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert_close(ours.read(tensor.name), torch.tensor(expected), atol=0, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused_before_anything_is_made(tmp_path, share):
    write_gguf(tmp_path / "m.gguf", llama(), "Q8_0")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FileFormatError) as caught:
        lowrank.load_model(tmp_path / "cut.gguf")
    assert "cut.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_random_damage_to_the_header_never_escapes_as_another_error(tmp_path):
    write_gguf(tmp_path / "m.gguf", llama(), "Q8_0")
    whole = bytearray((tmp_path / "m.gguf").read_bytes())
    header = min(t.offset for t in GGUFFile(tmp_path / "m.gguf").tensors.values())
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        at = int(torch.randint(0, header, ()))
        damaged[at : at + 4] = bytes(torch.randint(0, 256, (4,)).tolist())
        (tmp_path / "d.gguf").write_bytes(damaged)
        try:
            lowrank.load_model(tmp_path / "d.gguf")
        except (FileFormatError, ConfigError):
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"block_count": 2**31 - 1}, "missing tensors: blk.2147483646"),
        ({"rope_freq_base": float("nan")}, "rope_theta: expected a positive number; got nan"),
        ({"layer_norm_rms_eps": float("inf")}, "rms_norm_eps: expected a positive number; got inf"),
        ({"head_count": 0}, "num_attention_heads: expected a positive integer; got 0"),
    ],
)
def test_metadata_that_cannot_be_is_refused_with_the_file(tmp_path, metadata, says):
    write_gguf(tmp_path / "m.gguf", llama(), **metadata)
    with pytest.raises((ConfigError, FileFormatError), match=f"m.gguf: {says}"):
        lowrank.load_model(tmp_path / "m.gguf")


def test_a_part_of_a_model_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", llama(), uint16=("split.count", 3))
    with pytest.raises(FileFormatError, match="m.gguf: is a part of a model in 3 files; make them"):
        lowrank.load_model(tmp_path / "m.gguf")


def test_other_architectures_and_kinds_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write_codes(path, gguf.GGMLQuantizationType.F32, 4, 4, architecture="mamba")
    with pytest.raises(ConfigError, match="expected a GGUF architecture of llama, .*; got 'mamba'"):
        lowrank.load_model(path)
    path.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(FileFormatError, match="does not begin with 'GGUF'"):
        lowrank.load_model(path)
    path.write_bytes(b"GGUF\x00\x00\x00\x03" + bytes(100))
    with pytest.raises(FileFormatError, match="version 2 or 3, little-endian"):
        lowrank.load_model(path)
